"""On another number of ranks a run goes on with the same global batches in the same order: 4 ranks, 2, then 3, mid-epoch."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from support.small_run import EPOCH_STEPS, NUM_STEPS, end, finish, start, told
from support.timeline import Timeline

ARRANGE = "support.faults:arrange"


def recorded(directory: Path) -> list[list[int]]:
    """The examples of every global batch, in the order of the steps."""
    steps: dict[int, list[int]] = {}
    for file in sorted(directory.glob("rank*.jsonl")):
        for line in file.read_text().splitlines():
            content = json.loads(line)
            steps.setdefault(content["key"], []).extend(content["ids"])
    return [sorted(ids) for ids in steps.values()]


def test_four_then_two_then_three_ranks_in_mid_epoch(tmp_path):
    (tmp_path / "expected").mkdir()
    whole = finish(tmp_path / "whole", before=ARRANGE, RECORD=str(tmp_path / "expected"))
    expected = recorded(tmp_path / "expected")
    assert len(expected) == NUM_STEPS
    assert all(len(set(ids)) == 16 for ids in expected)

    cut, found = tmp_path / "cut", []
    for number, (num_ranks, at_step) in enumerate([(4, 20), (2, EPOCH_STEPS), (3, 0)]):
        (tmp_path / str(number)).mkdir()
        happening = {"AT_STEP": str(at_step), "ON_RANK": str(num_ranks - 1), "WHAT": "vote"}
        job = start(cut, num_ranks=num_ranks, before=ARRANGE, RECORD=str(tmp_path / str(number)), **happening)
        end(job, cut, 75 if at_step else 0)
        found += recorded(tmp_path / str(number))
    assert f"goes on from step {20 + EPOCH_STEPS}, attempt 3" in told(cut)
    assert found == expected, "the same examples in every global batch, in the same order"

    run = cut / "runs" / "small"
    losses = [[event["loss"] for event in Timeline(path).of("StepDone")] for path in (run, whole)]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=1e-4)
    weights, reference = (load_file(path / "model" / "model.safetensors") for path in (run, whole))
    assert weights.keys() == reference.keys()
    moved = 0.0
    for name, value in reference.items():
        other = weights[name]
        if name.endswith("attn.c_attn.bias"):
            # A key's bias shifts all of a row's scores alike: its gradient is rounding, which Adam blows up.
            width = len(value) // 3
            value, other = (torch.cat([bias[:width], bias[2 * width :]]) for bias in (value, other))
        torch.testing.assert_close(other, value, rtol=2e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")
        moved = max(moved, float((other - value).abs().max()))
    assert moved > 0, "with other sums to the last bit it would be the same run, not another number of ranks"
