"""Arguments of `fit` that are wrong before anything is loaded."""

from typing import Any

import pandas as pd
import pytest

from agnews_dist import fit
from agnews_dist.errors import ConfigError

ROWS = pd.DataFrame({"text": ["a", "b"], "label": [0, 1]})
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a function as sinks": ({"sinks": print}, "sinks=<built-in function print>: it takes a list of functions"),
    "a number as sink": ({"sinks": [5]}, "sinks=[5]: it takes a list of functions"),
    "a share above 1": ({"train": "rows.csv", "validation": 1.5}, "validation=1.5: it takes a number (more than 0, less"),
    "a count of 0": ({"model": "x", "epochs": 0}, "epochs=0: it takes a whole number (1 or more)"),
    "two sources": (
        {"train": "rows.csv", "data__source": "more.csv"},
        "data__source='more.csv' and train='rows.csv': both are",
    ),
    "rows and a source": ({"train": ROWS, "data__source": "x"}, "data__source='x' and train='in_memory': both are data.source"),
    "options among settings": ({"settings": {"debug": True, "name": "x"}}, "name: 2 sections have a setting of this name"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused_before_anything_is_loaded(arguments, message):
    with pytest.raises(ConfigError) as caught:
        fit(**arguments)
    assert message in str(caught.value)
