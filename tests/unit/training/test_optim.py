"""The learning rate as a function of the step, and which parameters decay."""

import itertools
import math

import pytest
import torch
from support.toy import toy_classifier
from torch import nn

from agnews_dist.training.optim import build_optimizer, learning_rate, set_lr


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_learning_rate_warms_up_to_the_peak_and_decays_to_just_above_zero(schedule):
    rates = [learning_rate(step, num_steps=100, peak=2.0, warmup_ratio=0.1, schedule=schedule) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.05
    middle = 55
    expected = 2.0 * (1 - 45 / 90) if schedule == "linear" else 2.0 * 0.5 * (1 + math.cos(math.pi * 45 / 90))
    assert rates[middle] == pytest.approx(expected)


def test_linear_schedule_equals_that_of_torch():
    parameter = nn.Parameter(torch.zeros(1))
    reference = torch.optim.SGD([parameter], lr=0.3)
    schedule = torch.optim.lr_scheduler.LinearLR(reference, start_factor=1.0, end_factor=0.0, total_iters=7)
    for step in range(7):
        mine = learning_rate(step, num_steps=7, peak=0.3, warmup_ratio=0.0, schedule="linear")
        assert mine == pytest.approx(reference.param_groups[0]["lr"])
        reference.step()
        schedule.step()


def test_learning_rate_may_warm_up_in_all_steps():
    rates = [learning_rate(s, num_steps=4, peak=1.0, warmup_ratio=1.0, schedule="cosine") for s in range(4)]
    assert rates == [0.25, 0.5, 0.75, 1.0]


def test_optimizer_decays_only_matrices_and_leaves_frozen_parameters_out():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    module[0].weight.requires_grad_(False)
    optimizer = build_optimizer(module, lr=0.1, weight_decay=0.5)
    set_lr(optimizer, 0.2)
    decayed, plain = optimizer.param_groups
    assert [p is module[2].weight for p in decayed["params"]] == [True]
    assert len(plain["params"]) == 4
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.5, 0.0)
    assert {group["lr"] for group in optimizer.param_groups} == {0.2}


def test_layer_decay_scales_the_rate_by_the_layers_above():
    suffix = toy_classifier(2).suffix
    suffix.add_module("wte", nn.Embedding(7, 24))  # as with trainable embeddings
    optimizer = build_optimizer(suffix, lr=0.1, weight_decay=0.5, layer_decay=0.5)
    set_lr(optimizer, 0.8)
    names = {weight: name for name, weight in suffix.named_parameters()}
    rates = {names[weight]: group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    assert rates.keys() == set(names.values())
    for name, rate in rates.items():
        expected = {"out_head": 0.8, "ln_f": 0.8, "h.2": 0.4, "h.1": 0.2, "wte": 0.1}
        assert rate == pytest.approx(next(value for prefix, value in expected.items() if name.startswith(prefix))), name
    for group in optimizer.param_groups:
        assert {weight.ndim > 1 for weight in group["params"]} == {group["weight_decay"] > 0}
