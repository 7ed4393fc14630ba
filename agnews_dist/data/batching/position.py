"""Position in the training data: (epoch, step) under a given plan. Pure numpy.

A step number means the same examples only under the same plan. A saved position therefore carries the plan's fingerprint, and
loading it under another plan fails with the fields that differ.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from agnews_dist.data.batching.settings import Lengths, PlanSettings, as_lengths, iterate_chunks
from agnews_dist.errors import UserError

ALGORITHM = 1
"""Version of the planning algorithm, part of the fingerprint. Raise it when equal settings give other global batches."""


def fingerprint_plan(lengths: Lengths, settings: PlanSettings) -> dict[str, int | str | None]:
    """Return everything that decides which examples are in global batch k of an epoch, ready for JSON.

    Plans with equal fingerprints are equal.
    """
    digest = hashlib.sha256()
    for _, chunk in iterate_chunks(as_lengths(lengths)):
        # As int64, so that the storage type does not matter.
        digest.update(chunk.astype("<i8").tobytes())
    named = asdict(settings)
    if settings.global_token_budget is not None:
        del named["global_batch_size"]
    return {"algorithm": ALGORITHM, **named, "num_examples": len(lengths), "lengths_sha256": digest.hexdigest()}


def save_position(epoch: int, step: int, plan_fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the position after `step` steps of `epoch` (both from 0), for a checkpoint. It is valid on any number of ranks."""
    return {"epoch": epoch, "step": step, "plan": dict(plan_fingerprint)}


def load_position(saved: Mapping[str, Any], plan_fingerprint: Mapping[str, Any]) -> tuple[int, int]:
    """Return (epoch, step) of a position that `save_position` made.

    Raises:
        UserError: `saved` is not a position, or belongs to another plan; names every field that differs, with both values.
    """
    plan, epoch, step = (saved.get(key) for key in ("plan", "epoch", "step"))
    if not isinstance(plan, Mapping) or type(epoch) is not int or type(step) is not int or epoch < 0 or step < 0:
        raise UserError(
            f"saved position {dict(saved)!r}: epoch and step must be whole numbers from 0, and plan a fingerprint. "
            "Give a position that save_position made."
        )
    differing = [
        f"{name} was {plan.get(name, 'absent')}, is {plan_fingerprint.get(name, 'absent')}"
        for name in {**plan, **plan_fingerprint}
        if plan.get(name, "absent") != plan_fingerprint.get(name, "absent")
    ]
    if differing:
        raise UserError(
            f"saved position (epoch {epoch}, step {step}) belongs to another plan ({'; '.join(differing)}): some examples "
            "would come twice, some never. Restore these settings and data, or start a new run."
        )
    return epoch, step
