"""Parts of the report that need no run: figures, tables, Markdown, the list of runs."""

import re
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import pytest
from markdown_it import MarkdownIt

from agnews_dist.report.pages import figures
from agnews_dist.report.pages.page import render, write_page
from agnews_dist.report.pages.parts import Cell, Headline, Page, Section, escape_markdown, looks_like_number, make_table
from agnews_dist.report.pages.run_sections import average_steps, settings_section
from agnews_dist.report.pages.stored_run import StoredRun
from agnews_dist.report.run_list import sort_runs

HOSTILE = "<script>alert(1)</script> | `x` *y*\n_z_"


def draw(key: str = "k", label: str = "a < b & c") -> figures.FigureFiles:
    with figures.figure_style():
        return figures.draw_figure(
            key, "T", "C", lambda axes: figures.draw_lines(axes, {label: ([1, 2], [3, 4])}, x_label=label, y_label="y")
        )


def test_draw_figure_keeps_text_and_follows_the_colours_of_the_page() -> None:
    figure = draw()
    assert ">a &lt; b &amp; c</text>" in figure.svg
    assert not set(re.findall(r"#[0-9a-f]{6}", figure.svg)), "every colour is a variable of the page"
    style = (Path(figures.__file__).parent / "templates" / "report.css").read_text()
    assert set(re.findall(r"var\(--(\w+)\)", figure.svg)) <= set(re.findall(r"--(\w+):", style))
    assert figure.png.startswith(b"\x89PNG")


def test_draw_figure_gives_ids_of_its_own() -> None:
    one, other = (set(re.findall(r'\bid="([^"]+)"', draw(key).svg)) for key in ("one", "other"))
    assert one
    assert not one & other
    svg = draw("one").svg
    assert {name[1:] for name in re.findall(r'(?:href="|url\()(#[^")]+)', svg)} <= one


def test_draw_figure_is_the_same_every_time() -> None:
    assert draw() == draw()


def test_figure_style_leaves_no_trace() -> None:
    before = dict(mpl.rcParams)
    draw()
    assert dict(mpl.rcParams) == before


def test_draw_figure_without_fonts_has_a_fault(tmp_path: Path) -> None:
    source = Path(mpl.__file__).parent
    copy = tmp_path / "matplotlib"
    (copy / "mpl-data").mkdir(parents=True)
    for path in source.iterdir():
        if path.name != "mpl-data":
            (copy / path.name).symlink_to(path)
    for path in (source / "mpl-data").iterdir():
        if path.name != "fonts":
            (copy / "mpl-data" / path.name).symlink_to(path)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import matplotlib.font_manager as fonts
fonts.findSystemFonts = lambda *_, **__: []
fonts.fontManager = fonts.FontManager()
fonts.findfont = fonts.fontManager.findfont
from agnews_dist.report.pages import figures
with figures.figure_style():
    print(figures.draw_figure("k", "T", "C", lambda axes: axes.set_title("x")).fault)
"""
    environ = {"MPLCONFIGDIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ)
    assert "font" in done.stdout.lower() or "ttf" in done.stdout.lower(), done
    assert done.stderr == ""


def page_of(*sections: Section) -> Page:
    return Page(HOSTILE, HOSTILE, "finished", (Headline(HOSTILE, "1"),), (HOSTILE,), sections)


def test_render_escapes_texts() -> None:
    section = Section("s", HOSTILE, HOSTILE, (make_table((HOSTILE,), [(HOSTILE,)], title=HOSTILE),), (), (HOSTILE,), "echo 1")
    html = render(page_of(section), "report.html.j2")
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 12
    text = render(page_of(section), "report.md.j2")
    assert not re.search(r"(?<!\\)<script", text)
    assert "| \\<script>alert(1)\\</script> \\| \\`x\\` \\*y\\* \\_z\\_ |" in text


@pytest.mark.parametrize(
    "text",
    [
        "[click](http://evil)",
        "![p](http://evil/p.png)",
        "&lt;b&gt; &copy;",
        "~~struck~~ $a$ $$b$$",
        "a\\|b \\[c](d) *e* __f__ `g`",
        "<https://evil> <b>bold</b>",
    ],
)
def test_escape_markdown_keeps_the_text_and_nothing_of_it_is_markup(text: str) -> None:
    escaped = escape_markdown(text)
    assert not re.search(r"\w://", escaped), "GitHub makes links of bare addresses"
    [inline] = [token for token in MarkdownIt("gfm-like", {"linkify": False}).parse(escaped) if token.type == "inline"]
    assert {token.type for token in inline.children or []} <= {"text", "text_special"}
    assert "".join(token.content for token in inline.children or []) == text
    assert not re.search(r"(?<!\\)\$", escaped)


def test_escape_markdown_parts_mentions_from_their_sign() -> None:
    assert escape_markdown("@octocat saw #1, a@b.c # www.evil.com") == (
        "@&#8203;octocat saw #&#8203;1, a@&#8203;b.c # www\\.evil.com"
    )


@pytest.mark.parametrize("template", ["report.html.j2", "report.md.j2"])
def test_render_escapes_control_characters(template: str) -> None:
    hostile = "a\x00b\x1b[31mc\u202ed"
    section = Section("s", hostile, hostile, (make_table((hostile,), [(hostile,)], note=hostile),), (draw(label=hostile),))
    page = Page(hostile, hostile, hostile, (Headline(hostile, hostile, hostile),), (hostile,), (section,))
    text = render(page, template)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert text.count("\\u202ed") > 8


def settings_run(num_ranks: int, ranks: str) -> StoredRun:
    return StoredRun(
        directory=Path("runs") / "a b",
        state="finished",
        reason="",
        status={},
        settings={},
        changed={},
        result={"num_ranks": num_ranks},
        events=({"event": "RunStarted", "facts": {"ranks": ranks}},),
        predictions={},
        class_names=(),
    )


@pytest.mark.parametrize(
    ("num_ranks", "ranks", "start"),
    [
        (1, "1 (1 per node), DDP", "python -m"),
        (8, "8 (8 per node), DDP", "torchrun --nproc_per_node=8 -m"),
        (
            16,
            "16 (8 per node), DDP",
            "torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=FIRST_NODE:29500 -m",
        ),
        (2, "", "torchrun --nproc_per_node=2 -m"),
    ],
)
def test_repeat_command_starts_as_many_ranks_on_as_many_nodes(num_ranks: int, ranks: str, start: str) -> None:
    command = settings_section(settings_run(num_ranks, ranks), {}).command
    config = Path("runs").resolve() / "a b" / "config.yaml"
    assert command == f"{start} agnews_dist.train --config '{config}' --run.name 'a b-again'"


def test_table_aligns_numbers() -> None:
    table = make_table(("name", "n", "mixed", "empty"), [("a", "1,024", "2", "-"), ("b", "-", "v2", "")])
    assert [table.is_number(column) for column in range(4)] == [False, True, False, False]
    assert table.rows[0][0] == Cell("a")
    assert looks_like_number("0.95 to 1.00")


def test_write_page_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "mine.pdf").touch()
    write_page(page_of(Section("s", "S", figures=(draw(),))), tmp_path)
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["k.png", "mine.pdf"]


def test_average_steps_keeps_sums() -> None:
    steps = [{"step": i + 1, "loss": float(i), "num_tokens": 10, "seconds": 0.5} for i in range(1000)]
    x, loss = average_steps(steps, "loss")
    assert len(x) == len(loss) == 60
    assert loss == pytest.approx([value - 1 for value in x])
    assert average_steps(steps, "num_tokens", per="seconds")[1] == pytest.approx([20.0] * 60)
    assert average_steps([{"step": 1, "loss": None}], "loss")[1] != [0.0]


def test_sort_runs_puts_unknown_values_last() -> None:
    runs = [
        {"name": name, "time": time, "size_bytes": size, "scores": {} if score is None else {"test": {"accuracy": score}}}
        for name, time, size, score in (("b", None, 3, None), ("a", "2026-01-01", 1, 0.5), ("c", "2026-02-01", 2, 0.9))
    ]
    names = {order: "".join(run["name"] for run in sort_runs(runs, order)) for order in ("name", "time", "size", "test")}
    assert names == {"name": "abc", "time": "cab", "size": "bca", "test": "cab"}
