"""The report of one run: its sections in order, as report.html, report.md and figures."""

from collections.abc import Mapping
from pathlib import Path

from agnews_dist import __version__
from agnews_dist.errors import UserError
from agnews_dist.report.formatting import escape_text
from agnews_dist.report.pages.details import SplitDetails
from agnews_dist.report.pages.figures import figure_style
from agnews_dist.report.pages.parts import Page, Section, escape_markdown
from agnews_dist.report.pages.run_sections import batch_section, curve_section, data_section, settings_section, time_section
from agnews_dist.report.pages.score_sections import (
    calibration_section,
    class_section,
    headlines,
    label_section,
    length_section,
    mistake_section,
    score_section,
)
from agnews_dist.report.pages.stored_run import Fields, StoredRun
from agnews_dist.storage.atomic import new_file

HTML_FILE = "report.html"
FIGURES = "figures"
"""Directory of the PNG files of report.md."""


def build_page(run: StoredRun, details: Mapping[str, SplitDetails], analysis: Fields) -> Page:
    """Build the report of a run. A part for which a file is missing is left out, and a warning says so.

    `analysis`: content of analysis.json; empty: the texts were not read.
    """
    with figure_style():
        sections: list[Section | None] = []
        main = details[run.main_split] if run.main_split is not None else None
        if main is not None:
            sections.append(score_section(run, details, analysis))
        sections.append(curve_section(run))
        if main is not None:
            sections += [
                class_section(run, main),
                calibration_section(main),
                length_section(main, analysis),
                mistake_section(run, main, analysis),
                label_section(run, analysis),
            ]
        sections += [
            data_section(run, analysis),
            time_section(run, analysis),
            batch_section(run),
            settings_section(run, analysis),
        ]
    settings = run.settings
    return Page(
        title=run.name,
        subtitle=f"{settings.get('model.name', 'a model')} on {settings.get('data.source', 'texts')}, "
        f"{_describe_progress(run)}",
        badge=run.state,
        headlines=headlines(run, details, analysis),
        warnings=(*_list_gaps(run), *analysis.get("notes", [])),
        sections=tuple(section for section in sections if section is not None),
    )


def _describe_progress(run: StoredRun) -> str:
    """Describe how far the run has come. A member of a sweep has no attempts of its own."""
    if run.status:
        return f"step {run.status.get('step', '?')}, attempt {run.status.get('attempt', '?')}"
    return f"step {run.result.get('num_steps', '?')}" if run.result is not None else "step ?"


def _list_gaps(run: StoredRun) -> list[str]:
    """List what the report lacks because the run has not left it."""
    found: list[str] = []
    if run.state != "finished":
        scores = "" if run.predictions else ": it has no final scores yet"
        found.append(f"The run is {run.state} ({run.reason}){scores}.")
    elif not run.predictions:
        found.append("There are no files of predictions: scores, calibration and mistakes are left out.")
    # A member of a sweep is one of many trainings, without events and status of its own.
    is_member = not run.status and run.result is not None
    if not run.events and not is_member:
        found.append("events.jsonl cannot be read: curves and facts are left out.")
    if run.result is None and run.state == "finished":
        found.append("result.json cannot be read: times and batches are left out.")
    return found


def write_page(page: Page, directory: Path, name: str = "report") -> Path:
    """Write a page to a directory, in both formats with its figures; return the path of the HTML file.

    `name`: that of both files, without suffix.

    Raises:
        UserError: the directory cannot be written.
    """
    try:
        (directory / FIGURES).mkdir(parents=True, exist_ok=True)
        for figure in (each for each in page.figures if each.png):
            with new_file(directory / FIGURES / f"{figure.key}.png", is_durable=False) as temporary:
                temporary.write_bytes(figure.png)
        for suffix in ("md", "html"):
            with new_file(directory / f"{name}.{suffix}", is_durable=False) as temporary:
                temporary.write_text(render(page, f"report.{suffix}.j2"), encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(
            f"report in {directory}: it cannot be written ({error.strerror or error}). Free space there, make it writable, or "
            "set --output."
        ) from error
    return directory / f"{name}.html"


def check_output(directory: Path) -> None:
    """Check that a report may be written to a directory: a new or empty one, or one that holds a report and no run.

    Raises:
        UserError: it holds other files.
    """
    entries = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    if entries and (HTML_FILE not in entries or "config.yaml" in entries):
        raise UserError(
            f"--output {directory}: it holds other files than a report, which could be replaced. Set it to a new directory."
        )


def render(page: Page, template: str) -> str:
    """Fill in a template with a page; in HTML every text is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_escape_control,
    )
    environment.filters["cell"] = escape_markdown
    return environment.get_template(template).render(page=page, figures=FIGURES, version=__version__)


def _escape_control(value: object) -> object:
    """Escape control characters of a text: those of a terminal, and those that change the reading direction."""
    return escape_text(value, "utf-8") if type(value) is str else value  # figures are jinja2's Markup
