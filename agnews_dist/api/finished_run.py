"""A finished run, as `fit` returns it."""

import html
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from agnews_dist.events import Scores

if TYPE_CHECKING:
    from agnews_dist.api.loaded_model import LoadedModel, Prediction

REPORT = "report.html"
MAX_EMBEDDED_BYTES = 10_000_000
"""Size of a report up to which a notebook shows it."""


class Run:
    """A trained classifier and its results. A notebook shows the scores, and the report if there is one."""

    directory: Path
    """Directory of the run, absolute. docs/commands.md lists its files."""
    scores: Mapping[str, Scores]
    """Split (`validation`, `test`) -> scores of the best weights: `accuracy`, `macro_f1`, `loss` and others. Splits without
    labels have none."""

    def __init__(self, directory: Path, scores: Mapping[str, Scores]) -> None:
        self.directory, self.scores = directory, scores

    @property
    def report(self) -> Path | None:
        """Path of the report; None: the run has none."""
        path = self.directory / REPORT
        return path if path.is_file() else None

    @cached_property
    def model(self) -> "LoadedModel":
        """The classifier, loaded when it is first used; see `load`."""
        from agnews_dist.api.loaded_model import load  # late: of the ranks of a job, few classify texts

        return load(self.directory)

    def predict(self, texts: object, batch_size: int | None = None) -> "list[Prediction]":
        """Classify texts; see `LoadedModel.predict`."""
        return self.model.predict(texts, batch_size)

    def __repr__(self) -> str:
        parts = [f"{name} accuracy {each.accuracy:.4f}" for name, each in self.scores.items()]
        return f"Run({str(self.directory)!r}, {', '.join(parts)})"

    def _repr_html_(self) -> str:
        """Return the scores, and the report, for a notebook."""
        rows = [
            f"<tr><td>{html.escape(name)}</td><td>{each.num_examples:,}</td><td>{each.accuracy:.4f}</td>"
            f"<td>{each.macro_f1:.4f}</td><td>{each.loss:.4f}</td></tr>"
            for name, each in self.scores.items()
        ]
        head = "".join(f"<th>{name}</th>" for name in ("split", "rows", "accuracy", "macro F1", "loss"))
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        return f"<p><code>{html.escape(str(self.directory))}</code></p>{table}{self._embed_report()}"

    def _embed_report(self) -> str:
        path = self.report
        if path is None:
            return ""
        if path.stat().st_size > MAX_EMBEDDED_BYTES:
            return f"<p>report: <code>{html.escape(str(path))}</code></p>"
        page = html.escape(path.read_text(encoding="utf-8"))
        # A frame of its own: the page's styles must not change the notebook.
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 600px; border: 0" title="report"></iframe>'
