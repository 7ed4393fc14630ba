"""docs/tutorial.ipynb in a real kernel: every cell gives the output that is committed, but for the speed of the machine."""

import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from support import house, tutorial

MAX_COLUMNS = 110
TOLERANCE = 0.02
"""Difference of decimal numbers. Processors round sums differently, so another one may classify a few texts otherwise."""
EXTRA = re.compile(r" so far$|\) after [\d.]+ s, | step +\d+/\d+  epoch | checkpoint of step ")
"""Lines of progress of which a slow machine prints more, or at other steps."""
MASKS = (
    (r"^\d\d:\d\d:\d\d ", "TIME "),
    (r"\d{4}-\d\d-\d\d", "DATE"),
    (r"[\d.,]+ (s|tokens/s|examples/s|MB)\b", r"N \1"),
    # The accuracy next to them has the tolerance; chance decides the rest.
    (r"\(\d+ of \d+\)", "(N of N)"),
    (r"only: \d+", "only: N"),
    (r"\bp(:| =) [\d.]+", r"p\1 N"),
)
DECIMAL = re.compile(r"-?\d+\.\d+")


@pytest.fixture(scope="module")
def committed() -> NotebookNode:
    return tutorial.read()


@pytest.fixture(scope="module")
def executed(committed: NotebookNode, tmp_path_factory: pytest.TempPathFactory) -> NotebookNode:
    return tutorial.execute(committed, tmp_path_factory.mktemp("tutorial"))


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts_of(cell: NotebookNode) -> dict[str, str]:
    """Return what a cell shows: kind of output -> text."""
    shown = {}
    for output in cell.outputs:
        texts = {output.name: output.text} if output.output_type == "stream" else output.data
        for kind, text in texts.items():
            key = f"{output.output_type} {kind}"
            shown[key] = shown.get(key, "") + text
    return shown


def mask(text: str) -> str:
    """Return a text without what depends on the speed of the machine."""
    lines = []
    for line in text.splitlines():
        if not EXTRA.search(line):
            for pattern, word in MASKS:
                line = re.sub(pattern, word, line)
            lines.append(" ".join(line.split()))
    return "\n".join(lines)


def assert_same(found: str, wanted: str) -> None:
    found, wanted = mask(found), mask(wanted)
    assert DECIMAL.sub("#", found) == DECIMAL.sub("#", wanted)
    numbers = [[float(number) for number in DECIMAL.findall(text)] for text in (found, wanted)]
    assert numbers[0] == pytest.approx(numbers[1], abs=TOLERANCE)


def test_every_cell_shows_what_is_committed(committed, executed):
    for cell, again in zip(code_cells(committed), code_cells(executed), strict=True):
        wanted, found = texts_of(cell), texts_of(again)
        for kind in wanted | found:
            try:
                assert_same(found.get(kind, ""), wanted.get(kind, ""))
            except AssertionError as error:
                raise AssertionError(f"cell {cell.id!r}, {kind}: run `make docs` if this is intended.\n{error}") from error


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ("same seed: False", "same seed: True"),
        ("accuracy 0.865", "accuracy 0.825"),
        ("rank 0: 12 texts", "rank 0: 13 texts"),
        ("", "accuracy 0.865"),
        (
            "12:00:01 frozen part: 163,742 tokens done in 3 s, 9 tokens/s",
            "12:00:01 frozen part: 9 tokens done in 3 s, 9 tokens/s",
        ),
    ],
)
def test_assert_same_refuses_another_output(found, wanted):
    with pytest.raises(AssertionError):
        assert_same(found, wanted)


def test_assert_same_ignores_the_speed_of_the_machine():
    slow = "12:00:01 part: 5/9 tokens (55%) after 4.0 s, 9 tokens/s\n12:00:01 part: 9 tokens done in 7.8 s, 20,705 tokens/s"
    assert_same(slow, "11:00:01 part: 9 tokens done in 3.9 s, 40,887 tokens/s")


def test_notebook_holds_nothing_of_the_machine_that_ran_it(committed):
    nbformat.validate(committed)
    assert (committed.nbformat, committed.nbformat_minor) == (4, 5)
    assert committed.metadata == tutorial.METADATA
    assert all(cell.metadata == {} for cell in committed.cells)
    assert [cell.execution_count for cell in code_cells(committed)] == list(range(1, len(code_cells(committed)) + 1))
    shown = "".join(text for cell in code_cells(committed) for text in texts_of(cell).values())
    assert not re.search(r"/(home|root|tmp|work|usr|Users)/", shown)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", shown)


def test_notebook_is_short_and_plain(committed):
    assert len(code_cells(committed)) <= 16
    assert max(len(line) for cell in code_cells(committed) for line in cell.source.splitlines()) <= MAX_COLUMNS
    assert all(re.fullmatch(r"[a-z]+(-text)?", cell.id) for cell in committed.cells)
    for cell in committed.cells:
        prose = cell.source if cell.cell_type == "markdown" else "\n".join(re.findall(r"#\s(.*)", cell.source))
        assert house.BANNED.findall(prose) == [], cell.id
        assert [text for text in house.sentences(prose) if len(text.split()) > house.MAX_SENTENCE] == [], cell.id


def test_links_of_the_notebook_exist(committed):
    links = re.findall(r"\]\(([^)#\s]+)", "\n".join(cell.source for cell in committed.cells if cell.cell_type == "markdown"))
    assert len(links) > 10
    missing = [link for link in links if not (Path(tutorial.NOTEBOOK).parent / link).exists()]
    assert missing == []
