"""Lists and ranges of settings."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.settings import write

from agnews_dist.commands.arguments import load
from agnews_dist.errors import ConfigError
from agnews_dist.experiments.space import Dimension, Interval, Space, format_values, make_space


def dimensions_of(*argv: str) -> dict[str, tuple[object, ...] | Interval]:
    loaded = load(argv, takes_lists=True)
    return {each.key: each.interval or each.values for each in loaded.dimensions}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--optim.lr", "1e-4,3e-4"], {"optim.lr": (1e-4, 3e-4)}),
        (["--optim.lr=1e-4, 3e-4"], {"optim.lr": (1e-4, 3e-4)}),
        (["--run.seed", "0..3"], {"run.seed": (0, 1, 2, 3)}),
        (["--run.seed", "0..2,7"], {"run.seed": (0, 1, 2, 7)}),
        (["--run.seed", "5..5"], {"run.seed": (5,)}),
        (["--model.trainable_blocks", "0..2,all"], {"model.trainable_blocks": (0, 1, 2, "all")}),
        (["--optim.schedule", "linear,cosine"], {"optim.schedule": ("linear", "cosine")}),
        (["--optim.patience", "null,3"], {"optim.patience": (None, 3)}),
        (["--optim.class_weights", '["none", "balanced", [1, 2]]'], {"optim.class_weights": ("none", "balanced", (1.0, 2.0))}),
        (["--model.name", "embedded,gpt2"], {"model.name": ("embedded", "gpt2")}),
        (["--model.name", '["a,b", "c"]'], {"model.name": ("a,b", "c")}),
        (["--optim.lr", "1e-4..1e-2"], {"optim.lr": Interval(1e-4, 1e-2)}),
        (["--optim.lr", "1,2", "--optim.lr", "0.5"], {}),
        # Settings that are lists, texts with commas, and paths that all members share have one value.
        (["--data.text_column", "title,description"], {}),
        (["--data.text_separator", ", "], {}),
        (["--run.dir", "runs,old"], {}),
        (["--data.source", '["a,b.csv"]'], {"data.source": ("a,b.csv",)}),
        (["--data.source", "../rows"], {}),
    ],
)
def test_lists_and_ranges_become_dimensions(argv: list[str], expected: dict[str, object]) -> None:
    assert dimensions_of(*argv) == expected


def test_lists_in_a_file_become_dimensions(tmp_path) -> None:
    path = write(
        tmp_path / "a.yaml", "optim: {lr: [1.0e-4, 3e-4], class_weights: [[1, 2], none]}\ndata: {class_names: [a, b]}\n"
    )
    assert dimensions_of("--config", path) == {"optim.lr": (1e-4, 3e-4), "optim.class_weights": ((1.0, 2.0), "none")}


def test_config_has_the_first_value_of_each_list() -> None:
    loaded = load(["--optim.lr", "1e-4,3e-4", "--run.seed", "3..5", "--optim.epochs", "2"], takes_lists=True)
    assert (loaded.config.optim.lr, loaded.config.run.seed, loaded.config.optim.epochs) == (1e-4, 3, 2)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--run.seed", "3..1"], "the range is empty, as 3 is above 1. Write 1..3."),
        (["--optim.lr", "1e-2..1e-4"], "the range is empty"),
        (["--run.seed", "0..x"], "a range is two whole numbers"),
        (["--run.seed", "0,0"], "0 is listed twice. Remove one."),
        (["--optim.lr", "1e-3,0.001"], "0.001 is listed twice. Remove one."),
        (["--run.seed", "0..2,1"], "1 is listed twice"),
        (["--optim.lr", "1e-3,"], "a value is empty"),
        (["--optim.lr", "1e-3,fast"], "it takes a number"),
        (["--optim.lr", "1e-4..1e-2,1"], "a range of real numbers is alone"),
        (["--engine.timeout_seconds", "1,2"], "it is the same for all members of a sweep. Give it one value, or"),
        (["--optim.best_metric", "loss,accuracy"], "it is the same for all members of a sweep"),
        # One engine trains all members, each on one rank.
        (["--engine.precision", "fp32,bf16"], "Give it one value, or run one sweep for each."),
        (["--engine.allow_tf32", "true,false"], "it is the same for all members of a sweep"),
        (["--engine.gradient_compression", "none,bf16"], "it is the same for all members of a sweep"),
        (["--checkpoint.keep", "1..2"], "it is the same for all members of a sweep"),
        *(
            ([f"--data.{name}", values], "scores of different rows cannot be compared. Give it one value")
            for name, values in {
                "source": "a.csv,b.csv",
                "revision": "v1,v2",
                "splits.validation": "validation,test",
                "splits.train": "train,all",
                "text_column": '[["title"], ["title", "text"]]',
                "text_separator": '[" ", "-"]',
                "label_column": "fine,coarse",
                "class_names": '[["a", "b"], ["b", "a"]]',
                "validation_fraction": "0.05..0.1",
                "limit_validation": "100,200",
                "limit_test": "100,null",
                "seed": "0..2",
            }.items()
        ),
        (["--run.seed", "0..100000"], "more than 100,000 values"),
        (["--optim.lrr", "1,2"], "Did you mean 'optim.lr'?"),
    ],
)
def test_wrong_lists_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(argv, takes_lists=True)
    assert message in str(caught.value).replace("--optim", "optim")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dimensions", "num_samples", "message"),
    [
        ([], None, "no setting has a list or a range"),
        ([Dimension("optim.lr", (), Interval(0.1, 1.0))], None, "a range of numbers has no end. Set --samples N"),
        ([Dimension("optim.epochs", tuple(range(1, 1001))), Dimension("run.seed", tuple(range(101)))], None, "101,000 members"),
        ([Dimension("optim.epochs", (1, 2))], 100_001, "100,001 members"),
    ],
)
def test_spaces_without_a_bound_are_refused(dimensions: list[Dimension], num_samples: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_space(dimensions, seed=0, num_samples=num_samples)


def test_seed_of_the_settings_counts_where_none_is_listed() -> None:
    assert make_space([Dimension("optim.lr", (1.0, 2.0))], seed=7, num_samples=None).seeds == (7,)


def test_grid_has_every_combination_once() -> None:
    space = Space((Dimension("optim.lr", (1.0, 2.0)), Dimension("optim.epochs", (1, 2, 3))), (0,))
    found = list(space.grid())
    assert len(found) == space.num_combinations == 6
    assert len({tuple(each.items()) for each in found}) == 6
    assert found[:2] == [{"optim.lr": 1.0, "optim.epochs": 1}, {"optim.lr": 1.0, "optim.epochs": 2}]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(0, 5))
def test_samples_are_different_and_repeatable(num_samples: int, seed: int) -> None:
    space = Space((Dimension("optim.lr", (), Interval(1e-4, 1e-1)), Dimension("optim.epochs", (1, 2, 3))), (0,))
    found = space.sample(num_samples, seed)
    assert found == space.sample(num_samples, seed)
    assert len({tuple(each.values()) for each in found}) == len(found) == num_samples
    assert all(1e-4 <= each["optim.lr"] <= 1e-1 and each["optim.epochs"] in (1, 2, 3) for each in found)


def test_samples_of_a_small_space_are_all_of_it() -> None:
    space = Space((Dimension("optim.epochs", (1, 2, 3)),), (0,))
    assert sorted(each["optim.epochs"] for each in space.sample(10, 0)) == [1, 2, 3]
    assert len(Space((Dimension("optim.lr", (), Interval(1.0, 1.0)),), (0,)).sample(5, 0)) == 1


def test_wide_intervals_are_sampled_on_a_logarithmic_scale() -> None:
    generator = random.Random(0)
    wide, narrow = Interval(1e-5, 1e-1), Interval(0.0, 1.0)
    low = sum(wide.sample(generator) < 1e-3 for _ in range(2000)) / 2000
    assert 0.45 < low < 0.55
    assert 0.45 < sum(narrow.sample(generator) < 0.5 for _ in range(2000)) / 2000 < 0.55


def test_settings_are_formatted_as_flags() -> None:
    assert (
        format_values({"optim.lr": 1e-3, "optim.class_weights": (1.0, 2.0)}) == "optim.lr=0.001 optim.class_weights=[1.0, 2.0]"
    )
    assert format_values({}) == "-"
