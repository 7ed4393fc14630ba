"""Sweeps that are refused before anything is loaded, and settings that have no effect on members."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agnews_dist.commands.arguments import load
from agnews_dist.commands.sweep import COMMAND, run
from agnews_dist.distributed.preemption import PreemptionHandler
from agnews_dist.distributed.world import World
from agnews_dist.errors import ConfigError
from agnews_dist.experiments.members import list_ignored
from agnews_dist.experiments.sweep_job import SweepJob, check_job, list_hub_requests

HEADS = ("--model.trainable_blocks", "0", "--run.seed", "0..1")
OPTUNA = {"search": "optuna", "num_samples": 4}
DISTILLED = {"wanted": frozenset({"ensemble", "distilled"})}


def make_job(*argv: str, **options: Any) -> SweepJob:
    loaded = load(argv, takes_lists=True)
    return SweepJob(loaded.config, loaded.dimensions, **options)


@pytest.mark.parametrize("search", [{}, OPTUNA, {"num_samples": 2}], ids=["grid", "optuna", "random"])
@pytest.mark.parametrize("solvers", ["adamw,lbfgs", "lbfgs"])
def test_solved_heads_are_neither_distilled_nor_halved(search: dict[str, Any], solvers: str) -> None:
    argv = (*HEADS, "--optim.solver", solvers, "--optim.weight_decay", "0.01,0.1")
    with pytest.raises(ConfigError, match=r"--distil with optim\.solver lbfgs"):
        check_job(make_job(*argv, **search, **DISTILLED))
    if search != OPTUNA:
        with pytest.raises(ConfigError, match=r"--halving with optim\.solver lbfgs"):
            check_job(make_job(*argv, **search, halving=2))
    check_job(make_job(*argv, **search))


@pytest.mark.parametrize("search", [{}, OPTUNA])
def test_drawn_weights_have_no_ensemble(search: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"--ensemble with model\.init random"):
        check_job(make_job("--model.init", "pretrained,random", "--run.seed", "0..1", **search, **DISTILLED))


@pytest.mark.parametrize("search", [{}, OPTUNA])
def test_list_hub_requests_has_every_model_with_its_weights(search: dict[str, Any], tmp_path: Path) -> None:
    job = make_job("--model.name", "gpt2,some/other", "--model.init", "pretrained,random", "--optim.lr", "1e-3,1e-2", **search)
    requests = list_hub_requests(job, *check_job(job))
    assert {each.repository.name for each in requests} == {"gpt2", "some/other", "fancyzhx/ag_news"}
    models = [each for each in requests if each.repository.kind == "model"]
    assert len(models) == 2
    assert all("model.safetensors" in each.choose(tmp_path) for each in models)


@pytest.mark.parametrize("option", [("--search", "optuna"), ("--search", "random"), ("--sample_seed", "0")])
def test_options_of_samples_are_refused_without_samples(option: tuple[str, str]) -> None:
    loaded = load(("--optim.lr", "1e-3,3e-3", *option), COMMAND.options, takes_lists=True)
    with pytest.raises(ConfigError, match=r"all combinations are trained\. Set --samples N, or leave it out\."):
        run(World(), replace(loaded, preemption=PreemptionHandler({})))


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_seeds_that_no_generator_takes_are_refused(seed: str) -> None:
    with pytest.raises(ConfigError, match=r"it takes a whole number \(0 or more, less than 4294967296\)"):
        load(("--samples", "2", "--sample_seed", seed), COMMAND.options)


def test_list_ignored_names_what_differs_from_the_defaults() -> None:
    assert list_ignored(load(()).config) == []
    argv = ("--checkpoint.resume", "never", "--batch.longest_first", "true", "--optim.lr", "1", "--run.debug", "true")
    ignored = ["batch.longest_first", "checkpoint.resume", "the first check of run.debug"]
    assert list_ignored(load(argv).config) == ignored
