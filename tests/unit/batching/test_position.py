"""Positions: a pair of whole numbers, valid on any number of ranks, refused under a plan with other batches."""

import json
import re
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from support.plans import plan_batches

from agnews_dist.data.batching.position import ALGORITHM, fingerprint_plan, load_position, save_position
from agnews_dist.data.batching.settings import Lengths, PlanSettings
from agnews_dist.data.rows import Ints
from agnews_dist.errors import UserError

LENGTHS = np.arange(200) * 7 % 53 + 1
CHOSEN = PlanSettings(global_batch_size=8, bucket_window=5, seed=3)
CHANGED: dict[str, Any] = {
    "global_batch_size": 9,
    "global_token_budget": 60,
    "bucket_window": "epoch",
    "seed": 4,
    "block_size": 2,
}


def batches(lengths: Lengths, chosen: PlanSettings) -> list[list[int]]:
    return [ids.tolist() for ids in plan_batches(lengths, chosen, epoch=1)]


def changed_length() -> Ints:
    lengths = LENGTHS.copy()
    lengths[150] += 20
    return lengths


def test_save_position_gives_json_without_ranks():
    saved = json.loads(json.dumps(save_position(2, 17, fingerprint_plan(LENGTHS, CHOSEN))))
    assert load_position(saved, fingerprint_plan(LENGTHS, CHOSEN)) == (2, 17)
    assert list(saved) == ["epoch", "step", "plan"]
    # It holds nothing about ranks, micro-batches or workers.
    assert set(saved["plan"]) == {
        "algorithm",
        *(field.name for field in fields(PlanSettings)),
        "num_examples",
        "lengths_sha256",
    }


@pytest.mark.parametrize("name", [field.name for field in fields(PlanSettings)])
def test_load_position_refuses_every_other_setting(name):
    other = replace(CHOSEN, **{name: CHANGED[name]})
    assert batches(LENGTHS, other) != batches(LENGTHS, CHOSEN)
    saved = save_position(0, 3, fingerprint_plan(LENGTHS, CHOSEN))
    was, is_now = getattr(CHOSEN, name), CHANGED[name]
    with pytest.raises(UserError) as refused:
        load_position(saved, fingerprint_plan(LENGTHS, other))
    message = str(refused.value)
    assert f"{name} was {was}, is {is_now}" in message
    assert message.startswith("saved position (epoch 0, step 3) belongs to another plan (")
    assert message.endswith("some examples would come twice, some never. Restore these settings and data, or start a new run.")
    # Equal fields are not named. Under a token budget the batch size is absent.
    assert message.count(" was ") == (2 if name == "global_token_budget" else 1)


@pytest.mark.parametrize(
    ("lengths", "named"),
    [
        (changed_length(), ["lengths_sha256"]),
        (LENGTHS[::-1], ["lengths_sha256"]),
        (LENGTHS[:-1], ["num_examples", "lengths_sha256"]),
    ],
)
def test_load_position_refuses_other_data(lengths, named):
    assert batches(lengths, CHOSEN) != batches(LENGTHS, CHOSEN)
    saved = save_position(0, 3, fingerprint_plan(LENGTHS, CHOSEN))
    with pytest.raises(UserError, match=r"belongs to another plan.*or start a new run") as refused:
        load_position(saved, fingerprint_plan(lengths, CHOSEN))
    assert re.findall(r"(\w+) was ", str(refused.value)) == named


def test_load_position_names_all_differences():
    saved = save_position(1, 5, fingerprint_plan(LENGTHS, CHOSEN))
    now = fingerprint_plan(LENGTHS[:40], PlanSettings(global_batch_size=16, bucket_window="epoch", seed=3))
    with pytest.raises(UserError) as refused:
        load_position(saved, now)
    for part in ("global_batch_size was 8, is 16", "bucket_window was 5, is epoch", "num_examples was 200, is 40"):
        assert part in str(refused.value)


def test_fingerprint_omits_a_batch_size_under_a_token_budget():
    first, second = (PlanSettings(global_batch_size=size, global_token_budget=90, seed=3) for size in (8, 9))
    assert batches(LENGTHS, first) == batches(LENGTHS, second)
    saved = save_position(0, 2, fingerprint_plan(LENGTHS, first))
    assert load_position(saved, fingerprint_plan(LENGTHS, second)) == (0, 2)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.uint64, ">i8"])
def test_fingerprint_is_independent_of_the_storage_type(kind):
    assert fingerprint_plan(LENGTHS.astype(kind), CHOSEN) == fingerprint_plan(LENGTHS, CHOSEN)


def test_fingerprint_covers_all_chunks():
    lengths = np.full((1 << 20) + 5, 9, dtype=np.uint8)
    before = fingerprint_plan(lengths, CHOSEN)
    lengths[-1] += 1
    assert fingerprint_plan(lengths, CHOSEN) != before


def test_load_position_refuses_another_algorithm():
    now = fingerprint_plan(LENGTHS, CHOSEN)
    saved = save_position(0, 3, {**now, "algorithm": 0, "retired_setting": 5})
    with pytest.raises(
        UserError, match=rf"algorithm was 0, is {ALGORITHM}; retired_setting was 5, is absent\): .*or start a new run"
    ):
        load_position(saved, now)


@pytest.mark.parametrize(
    "harm",
    [
        {"epoch": -1},
        {"step": -1},
        {"step": 2.0},
        {"step": True},
        {"epoch": "0"},
        {"epoch": None},
        {"plan": None},
        {"plan": "abc"},
    ],
    ids=str,
)
def test_load_position_refuses_wrong_types(harm):
    now = fingerprint_plan(LENGTHS, CHOSEN)
    with pytest.raises(UserError, match=r"^saved position \{.*\}: epoch and step must be .*Give a position that save_position"):
        load_position({**save_position(0, 3, now), **harm}, now)


def test_load_position_refuses_an_empty_object():
    with pytest.raises(UserError, match=r"^saved position \{\}: epoch and step must be"):
        load_position({}, fingerprint_plan(LENGTHS, CHOSEN))
