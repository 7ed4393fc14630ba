"""Completion in real shells: commands, settings, choices, names of files; installing it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from support.tools import skip_without

from agnews_dist.__main__ import main

SHELLS = {"bash": ["bash", "-i"], "zsh": ["zsh", "-i"]}
CASES = [
    ("agnews-dist tr", "agnews-dist train "),
    ("agnews-dist train --optim.sch", "--optim.schedule "),
    ("agnews-dist train --optim.schedule c", "--optim.schedule cosine "),
    ("agnews-dist evaluate --spl", "--split "),
    ("agnews-dist evaluate --split val", "--split validation "),
    ("agnews-dist train --config my", "--config my_settings.yaml "),
    ("agnews-dist train --engine.fast_path f", "--engine.fast_path false "),
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory with a file to complete."""
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "my_settings.yaml").touch()
    return tmp_path


def complete(shell: pexpect.spawn, line: str, expected: str) -> None:
    """Type a line and a tab; the shell must complete it to the expected end."""
    shell.send(line + "\t")
    shell.expect(re.escape(expected.strip()), timeout=20)
    shell.sendcontrol("u")
    # Ends the line whatever the shell has inserted after it, and waits for the prompt.
    shell.sendline("echo do''ne")
    shell.expect("done\r?\n", timeout=20)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHELLS)
def test_installed_completion_works_in_a_new_shell(name: str, home: Path) -> None:
    skip_without(name)
    (home / ".bashrc").write_text("PS1='$ '", encoding="utf-8")
    (home / ".zshrc").write_text("PS1='$ '\nunsetopt auto_menu list_ambiguous\n", encoding="utf-8")
    for _ in range(2):
        assert main(["--install_completion", name]) == 0
    startup = (home / f".{name}rc").read_text(encoding="utf-8")
    assert startup.startswith("PS1='$ '\n")
    assert startup.count("agnews_dist") == 1
    program, *options = SHELLS[name]
    environ = {**os.environ, "TERM": "dumb"}
    shell = pexpect.spawn(program, options, cwd=str(home), env=environ, encoding="utf-8", dimensions=(50, 200), timeout=20)
    try:
        shell.sendline("echo rea''dy")
        shell.expect("ready\r?\n")
        for line, expected in CASES:
            complete(shell, line, expected)
    finally:
        shell.close(force=True)


def test_installed_completion_works_in_fish(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skip_without("fish")
    assert main(["--install_completion=fish"]) == 0
    assert str(home / ".config" / "fish" / "completions" / "agnews-dist.fish") in capsys.readouterr().out
    for line, expected in CASES:
        done = subprocess.run(
            ["fish", "-c", "complete -C $argv[1]", line], cwd=home, capture_output=True, text=True, check=True
        )
        found = [answer.split("\t")[0] for answer in done.stdout.splitlines()]
        assert found == [expected.split()[-1]], line


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_printed_completion_is_a_script_of_the_shell(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    skip_without(name)
    assert main(["--print_completion", name]) == 0
    script = capsys.readouterr().out
    done = subprocess.run([name, "-n", "/dev/stdin"], input=script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_unknown_shell_and_unwritable_home_are_named(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    assert main(["--install_completion"]) == 2
    assert "--install_completion 'tcsh': there is completion for bash, zsh, fish. Write" in capsys.readouterr().err
    monkeypatch.setenv("SHELL", "/bin/bash")
    (home / ".local").touch()
    assert main(["--install_completion"]) == 2
    error = capsys.readouterr().err
    assert f"{home}/.local" in error
    assert "Use --print_completion bash." in error


def test_completion_is_listed_by_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "--install_completion [bash|zsh|fish] " in capsys.readouterr().out
