"""The memory that a sweep states before it trains, against the peak of its process."""

import json
import re
from pathlib import Path

import pytest
from support import small_run
from support.processes import python
from transformers import AutoTokenizer, GPT2Config

RATES = ("1e-5", "2e-5", "3e-5", "4e-5", "5e-5", "6e-5")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which a member takes 100 MB: weights, two moments, best weights."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(small_run.write_inputs() / "model")
    tokenizer.save_pretrained(directory)
    shape = {"n_positions": small_run.MAX_LENGTH, "n_embd": 512, "n_layer": 2, "n_head": 4}
    GPT2Config(vocab_size=len(tokenizer), **shape, bos_token_id=0, eos_token_id=0).save_pretrained(directory)
    return directory


# Three batch sizes are three waves: the second must not need the memory of the first.
AVERAGED = {"optim.average": "ema", "batch.global_batch_size": "16,8,4"}


@pytest.mark.parametrize(("num_members", "changes", "words"), [(2, AVERAGED, ()), (6, {}, ("--halving", "2"))])
def test_peak_memory_is_that_which_was_stated(
    tmp_path: Path, model: Path, num_members: int, changes: dict[str, str], words: tuple[str, ...]
) -> None:
    settings = small_run.settings() | {
        **{"model.name": model, "model.init": "random", "model.trainable_blocks": "all", "optim.epochs": 2},
        **{"optim.lr": ",".join(RATES[:num_members]), "data.limit_train": 64, "data.limit_validation": 40},
        **{"run.dir": tmp_path, "run.name": "s", "data.cache_dir": tmp_path / "cache"},
        **{"report.write": "false", "data.limit_test": 40},
        **changes,
    }
    done = python("-m", "agnews_dist", "sweep", *(f"--{key}={value}" for key, value in settings.items()), *words)
    memory = json.loads((tmp_path / "s" / "sweep.json").read_text())["memory"]
    stated = re.search(rf"memory +about (\S+) (MB|GB) per rank: .*; {num_members} members at a time\n", done.stdout)
    assert stated is not None
    assert done.stdout.index(stated[0]) < done.stdout.index("train member 0")
    assert float(stated[1]) * {"MB": 1e6, "GB": 1e9}[stated[2]] == pytest.approx(memory["expected_bytes"], rel=0.05)
    assert memory["expected_bytes"] == pytest.approx(memory["peak_bytes"], rel=0.15)


def test_memory_to_load_the_model_is_stated_where_it_is_more_than_training_takes(tmp_path: Path, model: Path) -> None:
    settings = small_run.settings() | {
        **{"model.name": model, "model.init": "random", "model.trainable_blocks": 0, "data.limit_train": 64},
        **{"run.dir": tmp_path, "run.name": "s", "data.cache_dir": tmp_path / "cache", "report.write": "false"},
    }
    done = python("-c", LOADING, *(f"--{key}={value}" for key, value in settings.items()), "--optim.lr", "1e-3,2e-3")
    memory = json.loads((tmp_path / "s" / "sweep.json").read_text())["memory"]
    assert re.search(r"at a time; \S+ [MG]B to load the model\n", done.stdout)
    assert memory["expected_bytes"] == pytest.approx(memory["peak_bytes"], rel=0.15)


LOADING = """
import sys
import torch
from agnews_dist.__main__ import main
from agnews_dist.experiments import feature_group

load = feature_group.setup.load_training_inputs

def load_with_copies(*arguments, **options):
    torch.ones(10**8)  # 400 MB for a moment
    return load(*arguments, **options)

feature_group.setup.load_training_inputs = load_with_copies
sys.exit(main(["sweep", *sys.argv[1:]]))
"""


COUNTING = """
import gc, sys, weakref
from agnews_dist.__main__ import main
from agnews_dist.experiments.member_training import MemberTraining

class Counted(MemberTraining):
    all = []

    def __init__(self, *arguments):
        gc.disable()
        super().__init__(*arguments)
        self.all.append(weakref.ref(self))
        self.count()

    def count(self):
        print("alive:", sum(each() is not None for each in self.all))

    def tensors(self):
        self.count()
        return super().tensors()

from agnews_dist.experiments import halving, sweep_runner
halving.MemberTraining = sweep_runner.MemberTraining = Counted
sys.exit(main(["sweep", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    # In waves of two members: of three that survive, at most two end at once.
    [((), "(1222){3}"), (("--halving", "2", "--optim.epochs", "2"), "1234563[23][12]")],
)
def test_ended_members_are_freed_without_a_collection(tmp_path: Path, words: tuple[str, ...], expected: str) -> None:
    """A collection of cycles comes seldom: it counts objects, and not the gigabytes that they hold."""
    settings = small_run.settings() | {
        **{"optim.lr": "1e-5,2e-5", "batch.global_batch_size": "16,8,4", "data.limit_train": 64},
        **{"run.dir": tmp_path, "run.name": "s", "data.cache_dir": tmp_path / "cache", "report.write": "false"},
    }
    done = python("-c", COUNTING, *(f"--{key}={value}" for key, value in settings.items()), *words)
    assert re.fullmatch(expected, "".join(re.findall(r"alive: (\d+)", done.stdout)))


SCORING = """
import gc, sys, weakref
from agnews_dist.__main__ import main
from agnews_dist.experiments import selection

alive, load = [], selection.load_member

def count(*arguments):
    gc.disable()
    classifier, weights = load(*arguments)
    alive.append(weakref.ref(classifier.suffix))
    print("loaded:", sum(each() is not None for each in alive))
    return classifier, weights

selection.load_member = count
sys.exit(main(["sweep", *sys.argv[1:]]))
"""


def test_seeds_are_scored_part_by_part(tmp_path: Path) -> None:
    settings = small_run.settings() | {
        **{"run.seed": "0..4", "data.limit_train": 64, "data.limit_validation": 40, "data.limit_test": 40},
        **{"run.dir": tmp_path, "run.name": "s", "data.cache_dir": tmp_path / "cache", "report.write": "false"},
    }
    done = python("-c", SCORING, *(f"--{key}={value}" for key, value in settings.items()), "--ensemble")
    # One seed at a time is trained, so three of the five are scored at once.
    assert re.findall(r"loaded: (\d+)", done.stdout) == ["1", "2", "3", "1", "2"]
    singles, ensemble = (json.loads((tmp_path / "s/sweep.json").read_text())[name] for name in ("selected", "ensemble"))
    assert len(singles["test"]["accuracy"]["values"]) == 5
    assert [row["name"] for row in ensemble] == ["best single", "mean single", "ensemble"]
