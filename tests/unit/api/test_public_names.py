"""The names of the package: they are there, and importing it loads nothing heavy."""

import json

import pytest
from support import fork_server

import agnews_dist

LIGHT = """
import json, sys

before = {*sys.modules}
import agnews_dist

print(json.dumps([sorted({*sys.modules} - before), agnews_dist.__all__, dir(agnews_dist)]))
"""


def test_importing_the_package_loads_nothing_heavy():
    loaded, names, listed = json.loads(fork_server.run_python("-c", LIGHT).stdout)
    assert loaded == ["agnews_dist"]
    assert {"fit", "load", "Run"} < {*names} <= {*listed}


def test_every_public_name_is_there():
    for name in agnews_dist.__all__:
        assert getattr(agnews_dist, name)
    with pytest.raises(AttributeError, match="module 'agnews_dist' has no attribute 'fitt'"):
        agnews_dist.fitt  # noqa: B018
