"""The largest step once before training, then forgotten: what does not fit into memory shows in the first second, not the
first hour.
"""

import torch

from agnews_dist.data.batching.loader import StepBatches
from agnews_dist.distributed import collectives
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import UserError
from agnews_dist.events import Emit, Progress, silent
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.training.step import summed_loss


def rehearse(classifier: Classifier, batches: StepBatches, engine: Engine, emit: Emit = silent) -> None:
    """Forward and backward of one step with room taken for the optimizer's moments; weights, gradients and random state stay.

    Called before `engine.prepare`: no rank talks to another, so a rank that runs out of memory leaves none waiting.

    Raises:
        SharedError: on all ranks, if any rank ran out of memory.
    """
    rows, tokens = max((batch.tokens_BT.shape for batch in batches.micro_batches), key=lambda shape: shape.numel())
    task = f"rehearse the largest step ({rows} x {tokens} tokens)"

    def attempted() -> None:
        try:
            _forward_and_backward(classifier, batches, engine)
        except RuntimeError as error:
            # CUDA has an error class of its own, the CPU's allocator and cuBLAS have not.
            words = ("allocate memory", "ALLOC_FAILED")
            if not isinstance(error, torch.OutOfMemoryError) and not any(word in str(error) for word in words):
                raise
            raise UserError(
                f"the largest step needs more memory than there is ({rows} x {tokens} tokens at once): the run would break off "
                "at its longest texts. Lower batch.max_tokens_per_rank, data.max_length or model.trainable_blocks."
            ) from error

    emit(Progress(task=task, done=0, total=1))
    collectives.agree(collectives.attempt(attempted))
    emit(Progress(task=task, done=1, total=1))


def _forward_and_backward(classifier: Classifier, batches: StepBatches, engine: Engine) -> None:
    suffix, device = classifier.suffix, engine.device
    was_training = suffix.training
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            suffix.train()
            moments = [torch.zeros_like(parameter) for parameter in suffix.parameters() for _ in range(2)]
            for batch in batches.micro_batches:
                summed_loss(classifier.logits(batch.tokens_BT, batch.lengths_B), batch).backward()
            del moments
    finally:
        suffix.zero_grad(set_to_none=True)
        suffix.train(was_training)
