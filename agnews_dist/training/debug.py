"""Debug mode: everything deterministic and loud, and first a check that one batch can be learnt by heart."""

import copy
import os

import torch

from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import UserError
from agnews_dist.events import OverfitChecked
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.training.optim import build_optimizer
from agnews_dist.training.step import summed_loss

OVERFIT_EXAMPLES = 8
OVERFIT_STEPS = 100


def be_deterministic() -> None:
    """Deterministic algorithms and anomaly detection for the whole process; call before the first CUDA work."""
    # cuBLAS needs a fixed workspace to be deterministic, and reads this only once.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.autograd.set_detect_anomaly(True)


def overfit_one_batch(classifier: Classifier, table: TokenTable, engine: Engine, *, lr: float) -> OverfitChecked:
    """Train a copy of the suffix, without dropout, on a few examples until it knows them by heart.

    A model that cannot is broken (labels shifted, gradients cut, learning rate absurd), and a long run would only hide it.

    Raises:
        UserError: blocks train, and the examples are still not all classified right after `OVERFIT_STEPS` steps.
    """
    suffix = copy.deepcopy(classifier.suffix).to(engine.device).eval()
    batch = table.batch(torch.arange(min(OVERFIT_EXAMPLES, len(table))).numpy())
    optimizer = build_optimizer(suffix, lr=lr, weight_decay=0.0)
    features = classifier.prefix.features(batch.tokens_BT, batch.lengths_B)
    num_examples = len(batch.labels_B)
    losses: list[float] = []
    accuracy = 0.0
    for _ in range(OVERFIT_STEPS):
        logits_BC = suffix(*features)
        loss = summed_loss(logits_BC, batch) / num_examples
        losses.append(loss.item())
        accuracy = (logits_BC.argmax(dim=1) == batch.labels_B).double().mean().item()
        if accuracy == 1.0 and losses[-1] < 0.1:
            break
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    # A norm and a head alone may be unable by nature: two texts whose last tokens look alike to the frozen part.
    if accuracy < 1.0 and len(classifier.suffix.h):
        raise UserError(
            f"{num_examples} examples could not be learnt in {OVERFIT_STEPS} steps (accuracy {accuracy:.2f}, loss "
            f"{losses[0]:.3f} -> {losses[-1]:.3f}): a run on all data would not learn either. Check optim.lr ({lr}), the "
            "labels, and model.trainable_blocks."
        )
    return OverfitChecked(
        num_examples=num_examples,
        num_steps=len(losses) - 1,
        first_loss=losses[0],
        last_loss=losses[-1],
        accuracy=accuracy,
    )
