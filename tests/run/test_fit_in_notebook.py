"""`fit` in a real kernel of Jupyter: the four lines of the README, what they show, an interrupt, and launched ranks."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from support.processes import TIMEOUT, environment

from agnews_dist.data.synthetic import generate

ROWS = """
import pandas as pd
import json
df = pd.DataFrame(json.load(open("rows.json")), columns=["text", "label"])
"""
FOUR_LINES = """
from agnews_dist import fit
run = fit(train=df, validation=0.1, model="embedded", epochs=2, lr=1e-3, run__name="four")
print(run.predict(["The striker scored twice."])[0].label)
run
"""
INTERRUPTED = """
import os, signal
def interrupt(event):
    if type(event).__name__ == "StepDone" and event.step == 2:
        os.kill(os.getpid(), signal.SIGINT)
fit(train=df, validation=0.1, model="embedded", epochs=2, lr=1e-3, run__name="stopped", sinks=[interrupt])
"""
LAUNCHED = """
fit(train=df, validation=0.1, model="embedded", epochs=2, lr=1e-3, run__name="launched", launch=2).directory.name
"""
CODES = re.compile("[\x00-\x08\x0b-\x1f\x7f]")
"""Control codes but tab and newline."""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> NotebookClient:
    folder = tmp_path_factory.mktemp("notebook")
    names = ("world", "sport", "business", "science")
    rows = [(text, names[label]) for text, label in generate(120, 0, "train")]
    (folder / "rows.json").write_text(json.dumps(rows))
    cells = [nbformat.v4.new_code_cell(code) for code in (ROWS, FOUR_LINES, INTERRUPTED, LAUNCHED)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    found = NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3", allow_errors=True, coalesce_streams=True)
    places = {"XDG_CACHE_HOME": str(folder / "cache"), "JUPYTER_RUNTIME_DIR": str(folder / "runtime")}
    found.execute(cwd=str(folder), env=environment(**places))
    found.resources["folder"] = folder
    return found


def outputs(client: NotebookClient, cell: int) -> tuple[str, list[nbformat.NotebookNode]]:
    """Return what a cell printed, and its other outputs."""
    found = client.nb.cells[cell].outputs
    return "".join(each.text for each in found if each.output_type == "stream"), [
        each for each in found if each.output_type != "stream"
    ]


def test_four_lines_train_and_show_progress_and_scores(client):
    printed, [result] = outputs(client, 1)
    assert re.search(r"step +8/8 .*\n", printed)
    assert "epoch 2, step 8 validation: accuracy" in printed
    assert printed.splitlines()[-1] in ("world", "sport", "business", "science")
    assert "Warning" not in printed
    assert not CODES.search(printed)
    page = result["data"]["text/html"]
    assert "<td>validation</td><td>12</td>" in page
    assert "runs/four" in page


def test_interrupting_the_kernel_saves_a_checkpoint_and_leaves_the_kernel_alive(client):
    printed, [error] = outputs(client, 2)
    assert (error.ename, error.evalue) == (
        "KeyboardInterrupt",
        "stopped (SIGINT) at step 3, which is saved. The same command resumes from there.",
    )
    assert "interrupted: the training saves a checkpoint and stops" in printed


def test_launched_ranks_show_their_progress_in_the_notebook(client):
    printed, [result] = outputs(client, 3)
    assert result["data"]["text/plain"] == "'launched'"
    assert "ranks      2 (2 per node)" in printed
    assert re.search(r"step +8/8 .*\n", printed)
    assert not CODES.search(printed)
    folder: Path = client.resources["folder"]
    assert json.loads((folder / "runs" / "launched" / "status.json").read_text())["state"] == "finished"
