"""The tutorial notebook: executed in a real kernel, alone in a folder.

`PYTHONPATH=tests python -m support.tutorial` executes docs/tutorial.ipynb and writes its outputs back.
"""

import copy
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from support.processes import REPOSITORY, TIMEOUT, environment

NOTEBOOK = REPOSITORY / "docs" / "tutorial.ipynb"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
"""Metadata of the notebook, without the versions of this machine."""


def read() -> nbformat.NotebookNode:
    """Read the committed notebook."""
    return nbformat.read(NOTEBOOK, as_version=4)


def execute(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Return a copy of the notebook with outputs of its own. Its files are written to the empty `folder`.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    executed = copy.deepcopy(notebook)
    for cell in executed.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    client = NotebookClient(executed, timeout=TIMEOUT, kernel_name="python3", coalesce_streams=True, record_timing=False)
    search_path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    places = {"XDG_CACHE_HOME": str(folder / "cache"), "JUPYTER_RUNTIME_DIR": str(folder / "runtime"), "PATH": search_path}
    client.execute(cwd=str(folder), env=environment(**places))
    executed.metadata = nbformat.from_dict(METADATA)
    return executed


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        nbformat.write(execute(read(), Path(temporary)), NOTEBOOK)
    print(f"{NOTEBOOK.relative_to(REPOSITORY)} written")
