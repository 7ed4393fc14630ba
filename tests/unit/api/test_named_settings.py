"""Settings from Python values: names, values of all kinds, all errors at once."""

from pathlib import Path

import numpy as np
import pytest
from support.settings import write

from agnews_dist.api.named_settings import OPTIONS, NamedSettings
from agnews_dist.commands.command import TRAINING_OPTIONS
from agnews_dist.config.schema import Config
from agnews_dist.errors import ConfigError


def build(*files: object, **named: object) -> Config:
    found = NamedSettings()
    found.add_files(files)
    found.add_named(named)
    return found.build()


def errors_of(*files: object, **named: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build(*files, **named)
    return str(caught.value).split("\n")


def test_names_are_fields_sections_or_dotted_keys():
    config = build(epochs=7, optim__lr=1e-5, data__splits__train="mine", **{"run.name": "news"})
    assert (config.optim.epochs, config.optim.lr, config.data.splits.train, config.run.name) == (7, 1e-5, "mine", "news")


VALUES = [
    ("lr", 1, "optim", 1.0),
    ("lr", 3e-4, "optim", 3e-4),
    ("lr", np.float32(0.5), "optim", 0.5),
    ("lr", "1e-3", "optim", 1e-3),
    ("epochs", np.int64(2), "optim", 2),
    ("max_steps", None, "optim", None),
    ("overwrite", True, "run", True),
    ("fast_path", np.bool_(False), "engine", False),
    ("trainable_blocks", "all", "model", "all"),
    ("zero_stage", 2, "engine", 2),
    ("class_weights", [1, 2.5], "optim", (1.0, 2.5)),
    ("class_weights", np.array([0.1, 0.3]), "optim", (0.1, 0.3)),
    ("class_names", ("a, b", "c"), "data", ("a, b", "c")),
    ("text_column", "title,description", "data", ("title", "description")),
    ("cache_dir", Path("some") / "cache", "data", "some/cache"),
]


@pytest.mark.parametrize(("name", "value", "section", "expected"), VALUES)
def test_python_values_mean_what_they_mean_in_yaml(name, value, section, expected):
    found = getattr(getattr(build(**{name: value}), section), name)
    assert found == expected
    assert type(found) is type(expected)


def test_all_wrong_settings_are_reported_together(tmp_path):
    path = write(tmp_path / "my.yaml", "optim:\n  epoch: 3\n")
    lines = errors_of(path, lrr=1, lr="fast", epochs=3.0, max_steps=True, name="x", run={"name": "x"}, accept=["run.seed"])
    assert len(lines) == 8
    for part in (
        "unknown key 'optim.epoch'",
        "unknown setting 'lrr': it would have no effect. Did you mean 'optim.lr'?",
        "lr='fast': it takes a number (0 or more, finite). Correct it; the default is 0.001.",
        "epochs=3.0: it takes a whole number (1 or more)",
        "max_steps=True: it takes a whole number (1 or more) or null",
        "name: 2 sections have a setting of this name. Write model__name or run__name.",
        "run: a section takes settings below it. Write run__FIELD=VALUE.",
        "accept=['run.seed'], 'run.seed': it takes",
    ):
        assert any(part in line for line in lines), (part, lines)


@pytest.mark.parametrize("value", [object(), {"a": 1}, {1}, float("nan"), np.zeros((2, 2)), [[1]]])
def test_values_of_other_kinds_are_refused(value):
    [line] = errors_of(lr=value)
    assert line.startswith("lr=")
    assert "it takes a number" in line


def test_a_setting_by_two_names_is_refused():
    assert errors_of(lr=1, optim__lr=2) == ["optim__lr=2 and lr=1: both are optim.lr. Remove one."]


def test_arguments_beat_files_and_later_files_beat_earlier_ones(tmp_path):
    first = write(tmp_path / "first.yaml", "optim:\n  lr: 1\n  epochs: 1\n  warmup_ratio: 0.1\n")
    second = write(tmp_path / "second.yaml", "optim:\n  lr: 2\n  epochs: 2\n")
    config = build(Path(first), second, epochs=5)
    assert (config.optim.lr, config.optim.epochs, config.optim.warmup_ratio) == (2.0, 5, 0.1)
    assert errors_of(5) == ["config=5: it is not the path of a file. Write config='my.yaml'."]


def test_debug_sets_what_the_flag_sets():
    found = NamedSettings()
    found.add_named({"debug": True, "profile": True, "accept": ("optim.lr", "optim.epochs"), "model.name": "mine"})
    config = found.build()
    assert config.run.debug
    assert config.data.source == "synthetic"
    assert config.model.name == "mine"
    assert found.options == {
        "debug": True,
        "profile": True,
        "accept": ("optim.lr", "optim.epochs"),
        "quiet": False,
        "verbose": False,
    }
    assert not build(debug=False).run.debug
    assert build(run__debug=True).data.source != "synthetic"


def test_contradictions_are_reported():
    assert "engine.zero_stage 3 with engine.backend ddp" in errors_of(zero_stage=3)[0]


def test_options_are_those_of_the_command():
    assert {*OPTIONS} == {option.name.removeprefix("--") for option in TRAINING_OPTIONS} | {"debug"}
