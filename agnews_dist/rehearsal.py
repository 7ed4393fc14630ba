"""The largest step once before training, then forgotten: what does not fit into memory shows in the first second, not the
first hour.
"""

import torch

from agnews_dist import collectives
from agnews_dist.data.loader import StepBatches
from agnews_dist.engine import Engine
from agnews_dist.errors import UserError
from agnews_dist.events import Emit, Progress, silent
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.step import summed_loss


def rehearse(classifier: Classifier, batches: StepBatches, engine: Engine, emit: Emit = silent) -> None:
    """Forward and backward of one step with room taken for the optimizer's moments; weights, gradients and random state stay.

    Called before `engine.prepare`: no rank talks to another, so a rank that runs out of memory leaves none waiting.

    Raises:
        SharedError: on all ranks, if any rank ran out of memory.
    """
    emit(Progress(task="largest step, as a rehearsal", done=0, total=1))
    collectives.agree(collectives.attempt(lambda: _rehearse(classifier, batches, engine)))
    emit(Progress(task="largest step, as a rehearsal", done=1, total=1))


def _rehearse(classifier: Classifier, batches: StepBatches, engine: Engine) -> None:
    suffix, device = classifier.suffix, engine.device
    was_training = suffix.training
    rows, tokens = max(
        (tuple(batch.tokens_BT.shape) for batch in batches.micro_batches), key=lambda shape: shape[0] * shape[1]
    )
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            suffix.train()
            moments = [torch.zeros_like(parameter) for parameter in suffix.parameters() for _ in range(2)]
            for batch in batches.micro_batches:
                with engine.autocast():
                    loss = summed_loss(suffix(classifier.prefix(batch.tokens_BT), batch.lengths_B), batch)
                loss.backward()
            del moments
    except RuntimeError as error:
        # CUDA has an error class of its own, the CPU's allocator has not.
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise UserError(
            f"the largest step needs more memory than there is ({rows} x {tokens} tokens at once): the run would break off "
            "at its longest texts. Lower batch.max_tokens_per_rank, data.max_length or model.trainable_blocks."
        ) from error
    finally:
        suffix.zero_grad(set_to_none=True)
        suffix.train(was_training)
