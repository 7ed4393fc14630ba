"""README.md of an exported model: front matter the hub understands, results, how it was trained, how to use it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import yaml

from agnews_dist.evaluation.metrics import Scores

# What the hub accepts as `name` or `owner/name`.
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# Made on the spot by this package: no hub ids, though they look like one.
_EMBEDDED = ("embedded", "synthetic")


def model_card(
    *,
    name: str,
    base_model: str,
    dataset: str,
    class_names: Sequence[str],
    max_length: int,
    splits: Mapping[str, Scores],
    parameters: Mapping[str, tuple[int, int]],
    settings: Mapping[str, object],
    versions: Mapping[str, str],
    fingerprints: Mapping[str, str],
) -> str:
    """The text of the card.

    Args:
        name: the run's name.
        base_model: hub id or directory of the model that was fine-tuned, or 'embedded'.
        dataset: hub id, directory or file of the rows, or 'synthetic'.
        class_names: in the order of the labels.
        max_length: tokens of a text that the model was trained on.
        splits: split -> scores of exactly these weights, in the order to show.
        parameters: part of the model -> (trainable, frozen) counts.
        settings: setting -> value, in the order to show.
        versions: library -> version.
        fingerprints: what the weights depend on -> its hash.

    Only hub ids enter the front matter, and of a local path the card shows the last part: paths of the machine that
    trained the model mean nothing to the one that downloads it. The weights' licence is not ours to state.
    """
    base, data = _shown(base_model), _shown(dataset)
    front = yaml.safe_dump(_front_matter(name, base_model, dataset, splits), sort_keys=False, allow_unicode=True)
    blocks = [
        f"---\n{front}---",
        f"# {_cell(name)}",
        f"A GPT-2 text classifier for the classes {_listed(class_names)}: `{base}` with part of its weights frozen, "
        f"fine-tuned on `{data}` by `agnews_dist`. It classifies from the hidden state of a text's last token.",
        "## Results",
        _table(
            ("split", "examples", "accuracy", "macro F1", "loss (nats)"),
            [
                (split, f"{s.num_examples:,}", f"{s.accuracy:.4f}", f"{s.macro_f1:.4f}", f"{s.loss:.4f}")
                for split, s in splits.items()
            ],
        ),
        _CHOICE if {"validation", "test"} <= splits.keys() else "",
        *_confusions(splits, class_names),
        "## Use",
        "Run this inside this directory, or put its path or hub id in the place of `.`:",
        f"```python\n{_SNIPPET}```",
        f"`truncation=True` is needed: a bare pipeline passes a text on at any length, and one longer than the model's "
        f"positions crashes it. With it, a text is cut to its first {max_length:,} tokens, as in training.",
        "## Training",
        _table(("setting", "value"), [(f"`{key}`", f"`{_value(value)}`") for key, value in settings.items()]),
        _parameter_sentence(parameters),
        _table(
            ("part", "trainable", "frozen"),
            [(part, f"{train:,}", f"{frozen:,}") for part, (train, frozen) in parameters.items()],
        ),
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(data, class_names, max_length)),
        "## Reproducing it",
        "The same settings, data and versions give the same batches on any number of ranks. The run recorded these:",
        _table(("what", "fingerprint"), [(what, f"`{value}`") for what, value in fingerprints.items()]),
        _table(("library", "version"), [(library, version) for library, version in versions.items()]),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


_CHOICE = "The epoch was chosen on the validation split; the test split was scored once, after that choice."

_SNIPPET = """\
from transformers import pipeline

classify = pipeline("text-classification", model=".")
texts = [
    "Oil prices fall as supply fears ease",
    "Striker signs for two more seasons",
]
for text, answer in zip(texts, classify(texts, truncation=True)):
    print(f"{answer['label']:>10}  {answer['score']:.3f}  {text}")
"""


def _front_matter(name: str, base_model: str, dataset: str, splits: Mapping[str, Scores]) -> dict[str, object]:
    front: dict[str, object] = {
        "language": "en",
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["text-classification", "gpt2", "ag-news", "agnews_dist"],
        "metrics": ["accuracy", "f1"],
    }
    base, data = _hub_id(base_model), _hub_id(dataset)
    if base:
        front["base_model"] = base
    if data:
        front["datasets"] = [data]
    results = [
        {
            "task": {"type": "text-classification", "name": "Text Classification"},
            "dataset": {"type": data or _shown(dataset), "name": _shown(dataset), "split": split},
            "metrics": [
                {"type": "accuracy", "name": "Accuracy", "value": scores.accuracy},
                {"type": "f1", "name": "Macro F1", "value": scores.macro_f1},
            ],
        }
        for split, scores in splits.items()
    ]
    # The hub rejects an index without results.
    if results:
        front["model-index"] = [{"name": name, "results": results}]
    return front


def _hub_id(name: str) -> str | None:
    """`name` if it is a hub id; a relative path such as `models/gpt2` looks like one, so the file system decides."""
    is_id = _HUB_ID.fullmatch(name) is not None and name not in _EMBEDDED and not Path(name).exists()
    return name if is_id else None


def _shown(name: str) -> str:
    """How the text names a model or a data set: a hub id as it is, of a path the last part."""
    return name if _hub_id(name) or name in _EMBEDDED else Path(name).resolve().name


def _limits(data: str, class_names: Sequence[str], max_length: int) -> list[str]:
    if data == "synthetic":
        origin = "The training texts were generated by a program; the figures above say nothing about real news."
    else:
        origin = (
            "AG News was published for research and other non-commercial use; the data's licence may bind what is done "
            "with this model. No licence is stated here for the weights: they derive from the base model and the data."
        )
    return [
        origin,
        f"It knows {len(class_names)} classes and must choose one: a text about anything else gets one of them, often "
        "with a high score. Scores are softmax outputs, not calibrated probabilities.",
        f"It reads the first {max_length:,} tokens and ignores the rest. It was trained on short English news texts.",
    ]


def _confusions(splits: Mapping[str, Scores], class_names: Sequence[str]) -> list[str]:
    blocks: list[str] = []
    for split, scores in splits.items():
        rows = [
            (name, *(f"{count:,}" for count in row)) for name, row in zip(class_names, scores.confusion, strict=True)
        ]
        blocks += [
            f"Confusion on {_cell(split)} (rows: true class, columns: predicted):",
            _table(("", *class_names), rows),
        ]
    return blocks


def _parameter_sentence(parameters: Mapping[str, tuple[int, int]]) -> str:
    trainable, frozen = (sum(counts) for counts in zip(*parameters.values(), strict=True)) if parameters else (0, 0)
    return f"{trainable:,} of {trainable + frozen:,} parameters were trained:" if parameters else ""


def _listed(class_names: Sequence[str]) -> str:
    return ", ".join(_cell(name) for name in class_names)


def _value(value: object) -> str:
    """A setting's value; an absolute path, wherever it comes from, loses the directories of its machine."""
    text = str(value)
    return Path(text).name if text.startswith(("/", "~")) else text


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, or nothing where there are no rows."""
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    rule = f"|{' --- |' * len(header)}"
    return "\n".join([f"| {' | '.join(map(_cell, header))} |", rule, *lines]) if lines else ""


def _cell(text: str) -> str:
    """`text` so that it stays in its table cell."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
