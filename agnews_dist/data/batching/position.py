"""Where in the training data a run stands: (epoch, step), and which plan that refers to. Pure numpy.

A step's number means the same examples only under the same plan. So a saved position carries the plan's fingerprint, and is
refused by name under another one, rather than silently going on with other data.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from agnews_dist.data.batching.settings import Lengths, PlanSettings, as_lengths, chunks
from agnews_dist.errors import UserError

ALGORITHM = 1
"""Part of the fingerprint: raise it when equal settings give other global batches."""


def fingerprint(lengths: Lengths, settings: PlanSettings) -> dict[str, int | str | None]:
    """Everything that decides which examples are in global batch k of an epoch; JSON-ready. Equal ones mean equal plans."""
    digest = hashlib.sha256()
    for _, chunk in chunks(as_lengths(lengths)):
        # As int64, so that the storage type does not matter.
        digest.update(chunk.astype("<i8").tobytes())
    named = asdict(settings)
    if settings.global_token_budget is not None:
        del named["global_batch_size"]
    return {"algorithm": ALGORITHM, **named, "num_examples": len(lengths), "lengths_sha256": digest.hexdigest()}


def save_position(epoch: int, step: int, plan_fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps: `step` steps of `epoch` (both from 0) are done. It is valid on any number of ranks."""
    return {"epoch": epoch, "step": step, "plan": dict(plan_fingerprint)}


def load_position(saved: Mapping[str, Any], plan_fingerprint: Mapping[str, Any]) -> tuple[int, int]:
    """(epoch, step) of a saved position.

    Raises:
        UserError: it is none, or belongs to another plan; names every field that differs, with both values.
    """
    plan, epoch, step = (saved.get(key) for key in ("plan", "epoch", "step"))
    if not isinstance(plan, Mapping) or type(epoch) is not int or type(step) is not int or epoch < 0 or step < 0:
        raise UserError(
            f"the saved position {dict(saved)!r} is none: it needs epoch and step (whole numbers from 0) and the plan's "
            "fingerprint. Give one that save_position made."
        )
    differing = [
        f"{name} was {plan.get(name, 'absent')}, is {plan_fingerprint.get(name, 'absent')}"
        for name in {**plan, **plan_fingerprint}
        if plan.get(name, "absent") != plan_fingerprint.get(name, "absent")
    ]
    if differing:
        raise UserError(
            f"the saved position (epoch {epoch}, step {step}) belongs to another plan ({'; '.join(differing)}): its next step "
            "would be other examples than planned, some twice and some never. Restore these settings and data, or start anew."
        )
    return epoch, step
