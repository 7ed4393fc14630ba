"""A small kill campaign (kills.py): one kill in every phase."""

import json
import os

import kills
import pytest
from support.processes import TIMEOUT


@pytest.mark.timeout(4 * TIMEOUT)
def test_killed_runs_end_with_the_same_results(tmp_path):
    """Repeat a failure by setting AGNEWS_KILLS_SEED to the printed seed."""
    seed = os.environ.get("AGNEWS_KILLS_SEED")
    place = ["--directory", str(tmp_path), "--json", str(tmp_path / "kills.json")]
    words = ["--kills", "6", "--through_torchrun", "1", *place, *(["--seed", seed] if seed else [])]
    assert kills.main(words) == 0
    made = json.loads((tmp_path / "kills.json").read_text())["kills"]
    assert sorted(kill["aimed"] for kill in made) == ["evaluate", "export", "features", "save", "tokenise", "train"]
    assert {"forked", "torchrun"} == {kill["through"] for kill in made}
    assert {"TERM", "KILL", "STOP"} <= {kill["how"] for kill in made}
