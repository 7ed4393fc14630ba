"""Model card: front matter that the hub's reader accepts, tables with odd names, a snippet that runs."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support.scores import scores_of

from agnews_dist.report.model_card import ModelCard

VALIDATION = scores_of([[9, 1], [2, 8]], 8.0)
TEST = scores_of([[40, 10], [5, 45]], 50.0)


def card(**changes: Any) -> str:
    arguments: dict[str, Any] = {
        "name": "gpt2-2026-08-01",
        "base_model": "openai-community/gpt2",
        "dataset": "fancyzhx/ag_news",
        "class_names": ("World", "Sci/Tech"),
        "max_length": 256,
        "splits": {"validation": VALIDATION, "test": TEST},
        "parameters": {"embeddings": (0, 39_383_808), "out_head": (3_076, 0)},
        "settings": {"optim.lr": 1e-3, "data.pad_token": "new", "run.dir": "/home/someone/runs"},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "fingerprints": {"config": "c0ffee", "tokens": "beef"},
    }
    return ModelCard(**{**arguments, **changes}).to_markdown()


def front_matter(text: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found
    return yaml.safe_load(found[1])


def snippet(text: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


def test_front_matter_has_the_keys_of_the_hub() -> None:
    front = front_matter(card())
    assert front["pipeline_tag"] == "text-classification"
    assert front["library_name"] == "transformers"
    assert front["base_model"] == "openai-community/gpt2"
    assert front["datasets"] == ["fancyzhx/ag_news"]
    assert front["metrics"] == ["accuracy", "f1"]
    assert "license" not in front


def test_hub_reader_finds_the_scores() -> None:
    from huggingface_hub import ModelCard

    text = card()
    # Raises on an index it cannot read.
    found = ModelCard(text, ignore_metadata_errors=False)
    assert found.data.model_name == "gpt2-2026-08-01"
    results = found.data.eval_results
    assert results is not None
    assert [(r.dataset_split, r.metric_type, r.metric_value) for r in results] == [
        ("validation", "accuracy", 0.85),
        ("validation", "f1", VALIDATION.macro_f1),
        ("test", "accuracy", 0.85),
        ("test", "f1", TEST.macro_f1),
    ]
    assert {r.dataset_type for r in results} == {"fancyzhx/ag_news"}
    assert {r.task_type for r in results} == {"text-classification"}


def test_text_has_results_training_limits_and_fingerprints() -> None:
    text = card()
    for expected in (
        "| validation | 20 | 0.8500 | 0.8496 | 0.4000 |",
        "| test | 100 | 0.8500 | 0.8496 | 0.5000 |",
        "| World | 40 | 10 |",
        "| Sci/Tech | 5 | 45 |",
        "| `optim.lr` | `0.001` |",
        "| out_head | 3,076 | 0 |",
        "3,076 of 39,386,884 parameters were trained",
        "| torch | 2.13.0 |",
        "| config | `c0ffee` |",
        "research and other non-commercial use",
        "first 256 tokens",
        "No licence is stated here for the weights",
        "The test split was scored once",
    ):
        assert expected in text


def test_local_paths_are_neither_hub_ids_nor_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # `models/mini` looks like owner/name, but is a directory here.
    (tmp_path / "models" / "mini").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = card(base_model="models/mini", dataset=str(tmp_path / "rows.csv"))
    front = front_matter(text)
    assert "base_model" not in front
    assert "datasets" not in front
    assert front["model-index"][0]["results"][0]["dataset"]["type"] == "rows.csv"
    assert "`mini`" in text
    assert "`rows.csv`" in text
    assert str(tmp_path) not in text
    assert "/home/someone" not in text
    settings = {"data.source": "../secret/rows.csv", "data.class_names": [f"{tmp_path}/names.txt"], "model.name": "models/mini"}
    text = card(settings=settings | {"data.text_column": ["Sci/Tech", *"abcdefghijklmnopqrstuvwxyz"], "optim.lr": 0.1})
    rows = ("data.source` | `rows.csv", "data.class_names` | `names.txt", "model.name` | `mini", "optim.lr` | `0.1")
    assert all(f"| `{row}` |" in text for row in rows)
    assert "`Sci/Tech, a, b, c, d and 22 more`" in text


def test_generated_model_and_data_are_not_hub_ids() -> None:
    text = card(base_model="embedded", dataset="synthetic")
    front = front_matter(text)
    assert "base_model" not in front
    assert "datasets" not in front
    assert "say nothing about real news" in text
    assert "non-commercial" not in text


def test_nothing_is_claimed_about_other_data() -> None:
    text = card(dataset="someone/reviews")
    front = front_matter(text)
    assert "language" not in front
    assert front["tags"] == ["text-classification", "gpt2", "agnews_dist"]
    assert front["datasets"] == ["someone/reviews"]
    for claim in ("AG News", "non-commercial", "English", "news"):
        assert claim not in text.replace("agnews_dist", "")
    assert "No licence is stated here" in text
    assert front_matter(card(dataset="someone/ag_news"))["language"] == "en"


def test_many_classes_are_cut_and_have_no_table() -> None:
    names = tuple(f"topic {i}" for i in range(150))
    scores = scores_of(np.eye(150, dtype=int).tolist(), 1.0)
    text = card(class_names=names, splits={"test": scores})
    assert "for 150 classes (topic 0, topic 1," in text
    assert "topic 19 and 130 more)" in text
    assert "topic 20" not in text
    assert "Confusion" not in text
    assert len(text) < 5_000


def test_values_of_settings_are_short_and_name_no_local_path() -> None:
    names = [f"a|{k}" for k in range(10_000)]
    settings = {"data.class_names": ["/home/someone/names.txt"], "optim.class_weights": [0.5, 2.0], "optim.best_metric": "loss"}
    text = card(settings={**settings, "optim.patience": None, "engine.fast_path": True})
    for key, value in (("data.class_names", "names.txt"), ("optim.class_weights", "0.5, 2.0"), ("optim.patience", "null")):
        assert f"| `{key}` | `{value}` |" in text
    assert "| `engine.fast_path` | `true` |" in text
    assert "best `loss` on validation" in text
    assert r"`a\|0, a\|1, a\|2, a\|3, a\|4 and 9,995 more`" in card(settings={"data.class_names": names})


def test_odd_names_are_escaped() -> None:
    name = "run: 'a' | \"b\" #1\n---"
    text = card(name=name, class_names=("a|b", "c\nd"))
    assert front_matter(text)["model-index"][0]["name"] == name
    assert "| a\\|b | 40 | 10 |" in text
    assert "| c d | 5 | 45 |" in text


def test_a_confusion_matrix_too_wide_for_a_page_is_left_out() -> None:
    for num_classes in (20, 21, 300):
        scores = scores_of(np.eye(num_classes, dtype=int).tolist(), 1.0)
        text = card(class_names=tuple(f"c{i}" for i in range(num_classes)), splits={"test": scores})
        assert ("| c19 | 0 |" in text) == ("Confusion on test" in text) == (num_classes == 20)
        assert f"| test | {num_classes} | 1.0000 | 1.0000 |" in text


def test_a_card_without_scores_is_valid() -> None:
    from huggingface_hub import ModelCard

    text = card(splits={}, parameters={}, settings={})
    assert "model-index" not in front_matter(text)
    assert ModelCard(text, ignore_metadata_errors=False).data.eval_results is None
    assert "scored once" not in text


def test_snippet_compiles_and_truncates() -> None:
    compile(snippet(card()), "README.md", "exec")
    assert 'pipeline("text-classification", model=".")' in snippet(card())
    assert "truncation=True" in snippet(card())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_snippet_runs_in_a_model_directory(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check also that without truncation the pipeline crashes on a text longer than the positions."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification, pipeline

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2", model_max_length=64)
    tokenizer.pad_token = tokenizer.eos_token
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, n_positions=64, num_labels=2,
        id2label={0: "World", 1: "Sci/Tech"}, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    source = snippet(card())
    exec(compile(source, "README.md", "exec"), {})
    lines = [line for line in capsys.readouterr().out.splitlines() if re.search(r"(World|Sci/Tech)  [01]\.\d{3}  ", line)]
    assert len(lines) == 2
    classify = pipeline("text-classification", model=os.fspath(tmp_path))
    with pytest.raises((IndexError, RuntimeError)):
        classify("word " * 200)
    assert classify("word " * 200, truncation=True)[0]["label"] in {"World", "Sci/Tech"}
