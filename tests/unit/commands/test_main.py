"""The list of commands, without torch."""

import subprocess
import sys

import pytest
from support.processes import REPOSITORY

from agnews_dist.__main__ import COMMANDS
from agnews_dist.__main__ import main as run_main


def test_main_lists_commands_and_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main([]) == 2
    listed = capsys.readouterr().err
    assert len(COMMANDS) >= 5
    for command in COMMANDS:
        assert f"  {command} " in listed
    assert run_main(["trian"]) == 2
    assert "command 'trian': unknown. Did you mean 'train'?" in capsys.readouterr().err
    assert run_main(["--help"]) == 0
    assert "  train " in capsys.readouterr().out
    assert run_main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("agnews_dist 0.")


def test_main_loads_no_torch_for_help() -> None:
    code = (
        "import sys\n"
        "from agnews_dist.__main__ import main\n"
        "assert main(['--help']) == 0\n"
        "assert not {'torch', 'numpy', 'yaml'} & set(sys.modules)\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit as stopped: assert stopped.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "usage: agnews-dist train" in done.stdout
