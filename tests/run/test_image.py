"""The Dockerfile: lint, its arguments, what it copies; and a build, where a builder and the base image are to be had."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import REPOSITORY

DOCKERFILE = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
HADOLINT = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
TAG = "agnews_dist:test"


def instructions(name: str) -> list[str]:
    """Return the arguments of every instruction of this name, with its continued lines."""
    joined = re.sub(r"\\\n", " ", DOCKERFILE)
    return [line.split(maxsplit=1)[1] for line in joined.splitlines() if line.startswith(f"{name} ")]


def lint(text: str) -> subprocess.CompletedProcess[str]:
    assert HADOLINT is not None
    return subprocess.run([HADOLINT, "-"], input=text, capture_output=True, text=True, check=False, timeout=60)


def test_hadolint_finds_nothing() -> None:
    done = lint(DOCKERFILE)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    assert "DL3002" in lint(DOCKERFILE + "USER root\n").stdout


@pytest.mark.parametrize(
    ("torch", "expected"),
    [
        ("cuda", (0, "default\n", "")),
        ("cpu", (0, "https://download.pytorch.org/whl/cpu\n", "")),
        ("rocm", (1, "", "error: TORCH=rocm: must be cuda or cpu. Set --build-arg TORCH=cpu, for example.\n")),
    ],
)
def test_an_argument_chooses_the_build_of_torch(tmp_path: Path, torch: str, expected: tuple[int, str, str]) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "env.sh").write_text('echo "${PIP_EXTRA_INDEX_URL:-default}"\n')
    [install] = [command for command in instructions("RUN") if "launch/env.sh" in command]
    environ = {"PATH": "/usr/bin:/bin", "TORCH": torch}
    done = subprocess.run(["sh", "-c", install], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == expected


def test_the_image_is_for_any_user() -> None:
    [user] = instructions("USER")
    assert not user.startswith(("0", "root"))
    variables = dict(re.findall(r"(\w+)=(\S+)", " ".join(instructions("ENV"))))
    home = instructions("WORKDIR")[-1]
    # A user without an entry in /etc/passwd has neither.
    assert {"USER", "LOGNAME"} <= set(variables)
    assert variables["HOME"] == home
    assert f"mkdir --mode=1777 {home}" in DOCKERFILE
    assert instructions("ENTRYPOINT") == ['["/agnews_dist/launch/node.sh"]']


def test_the_context_has_what_the_image_needs_and_no_more() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert lines[1] == "*"
    assert {path for path in kept if not (REPOSITORY / path).exists()} == set()
    sources = [source for copied in instructions("COPY") for source in copied.split()[:-1] if source != "."]
    for source in sources:
        assert (REPOSITORY / source).exists(), source
        assert any(fnmatch.fnmatch(source, pattern) or source.startswith(f"{pattern}/") for pattern in kept), source
    assert {"tests", ".venv", "runs", ".git"} & kept == set()
    # What the wheel of the package includes must be there before it is installed.
    assert {"configs", "README.md"} <= set(sources)


def find_builder() -> str | None:
    """Return docker or podman if it runs here and has the base image, or can get it."""
    base = instructions("FROM")[0].replace("${PYTHON}", instructions("ARG")[0].split("=")[1])
    for builder in ("docker", "podman"):
        if shutil.which(builder) is None:
            continue
        for command in (["image", "inspect", base], ["pull", base]):
            done = subprocess.run([builder, *command], capture_output=True, check=False, timeout=600)
            if done.returncode == 0:
                return builder
    return None


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_image_builds_and_trains_as_any_user(tmp_path: Path) -> None:
    builder = find_builder()
    if builder is None:
        pytest.skip("no docker or podman that has the base image")
    build = [builder, "build", "--tag", TAG, "--build-arg", "TORCH=cpu", str(REPOSITORY)]
    subprocess.run(build, check=True, timeout=3000)
    tmp_path.chmod(0o777)
    options = ["--rm", "--user", "123456:0", "--env", "NPROC=2", "--volume", f"{tmp_path}:/workspace"]
    training = ["--config", "/agnews_dist/configs/quickstart.yaml", "--optim.epochs", "1", "--run.name", "image"]
    subprocess.run([builder, "run", *options, TAG, *training], check=True, timeout=600)
    assert (tmp_path / "runs" / "image" / "result.json").is_file()
    assert (tmp_path / "runs" / "image").stat().st_uid == 123456
