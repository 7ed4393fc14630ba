"""The result of `fit`, as text and in a notebook."""

from pathlib import Path

import pytest

from agnews_dist import Run, load
from agnews_dist.api import finished_run
from agnews_dist.errors import ConfigError, ModelError
from agnews_dist.events import Scores

SCORES = Scores(num_examples=1200, num_correct=900, accuracy=0.75, macro_f1=0.5, loss=1.25, confusion=None)


def test_run_shows_scores_and_escapes_names(tmp_path):
    run = Run(tmp_path / "a<b", {"test": SCORES})
    assert repr(run) == f"Run('{tmp_path}/a<b', test accuracy 0.7500)"
    assert "a&lt;b" in run._repr_html_()
    assert "<td>test</td><td>1,200</td><td>0.7500</td><td>0.5000</td><td>1.2500</td>" in run._repr_html_()


def test_run_embeds_its_report_in_a_frame_unless_it_is_large(tmp_path, monkeypatch):
    run = Run(tmp_path, {"test": SCORES})
    assert run.report is None
    assert "iframe" not in run._repr_html_()
    (tmp_path / "report.html").write_text('<p class="x">a & b</p>')
    assert run.report == tmp_path / "report.html"
    assert '<iframe srcdoc="&lt;p class=&quot;x&quot;&gt;a &amp; b&lt;/p&gt;"' in run._repr_html_()
    monkeypatch.setattr(finished_run, "MAX_EMBEDDED_BYTES", 5)
    assert "iframe" not in run._repr_html_()
    assert "report.html" in run._repr_html_()


def test_load_refuses_other_things_than_classifiers(tmp_path: Path):
    with pytest.raises(ModelError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"device='tpu': it takes auto, cpu or cuda\..*\nprecision='half'"):
        load(tmp_path, device="tpu", precision="half")
