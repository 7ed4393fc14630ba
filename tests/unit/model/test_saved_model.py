"""Config and weights that others have saved: read as transformers reads them, or refused by the name of the field."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import edit_json, keep_lm_head_only, rename_weights, save_tiny_model
from transformers import GPT2Model

from agnews_dist.errors import ModelError
from agnews_dist.model.export import load_classifier
from agnews_dist.model.gpt2 import Backbone, load_backbone, split_model
from agnews_dist.model.pretrained import load_tokenizer

pytestmark = pytest.mark.slow
NAMES = {"0": "World", "1": "Sports", "2": "Business", "3": "Sci/Tech"}


def load(directory: Path) -> Backbone:
    tokenizer = load_tokenizer(str(directory), revision=None, pad_token="eos")
    return load_backbone(str(directory), revision=None, init="pretrained", seed=0, tokenizer=tokenizer)


def assert_same_weights(loaded: GPT2Model, expected: GPT2Model) -> None:
    ours, theirs = loaded.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"id2label": {"1": "a", "2": "b", "3": "c", "4": "d"}}, r"id2label has the keys 1, 2, 3, 4: they must be 0 to 3"),
    ({"id2label": {"a": "x", "b": "y"}}, r"id2label has the keys a, b: they must be 0 to 1"),
    ({"id2label": ["a", "b"]}, r"id2label is \['a', 'b'\]: it must map 0, 1, \.\.\. to names"),
    ({"id2label": {"0": 0, "1": 1, "2": 2, "3": 3}}, r"id2label has the name 0: names must be texts"),
    ({"id2label": dict.fromkeys("0123", "News")}, r"id2label names more than one class 'News': names must differ"),
    ({"id2label": NAMES, "num_labels": 3}, r"num_labels is 3: id2label has 4 names"),
    ({"problem_type": "regression"}, r"problem_type is 'regression': it must be 'single_label_classification' or null"),
    ({"problem_type": "multi_label_classification"}, r"problem_type is 'multi_label_classification'"),
]


@pytest.mark.parametrize(("changes", "message"), FAULTS)
def test_a_head_of_another_kind_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    model = save_tiny_model(tmp_path, num_classes=4, label2id={}, **changes)
    with pytest.raises(ModelError, match=rf"config\.json of model '.*': {message}.*\. Correct config\.json, or choose another"):
        load_classifier(str(tmp_path))
    if "a" in changes.get("id2label", {}):
        with pytest.raises(ModelError, match="cannot be read"):  # transformers itself cannot
            load(tmp_path)
        return
    # A training does not need the head.
    backbone = load(tmp_path)
    assert (backbone.head_CD, backbone.class_names) == (None, None)
    assert backbone.head_fault is not None
    assert_same_weights(backbone.model, model.transformer)


def test_faultless_heads_load(tmp_path: Path) -> None:
    for changes in ({"id2label": NAMES}, {"problem_type": "single_label_classification"}, {"problem_type": None}):
        save_tiny_model(tmp_path, num_classes=4, **changes)
        assert len(load_classifier(str(tmp_path)).class_names) == 4


def test_tied_weights_stored_as_the_head_alone(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path)
    keep_lm_head_only(tmp_path)
    assert_same_weights(load(tmp_path).model, model.transformer)
    rename_weights(tmp_path, "module.")
    assert_same_weights(load(tmp_path).model, model.transformer)
    edit_json(tmp_path / "config.json", tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"1 are missing, such as wte\.weight"):
        load(tmp_path)


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize(
    ("prefix", "inner", "as_bin"),
    [("_orig_mod.", "", False), ("module.", "", True), ("module._orig_mod.", "", True), ("module.", "_orig_mod.", False)],
)
def test_prefixes_of_wrappers_are_removed(tmp_path: Path, num_classes: int, prefix: str, inner: str, as_bin: bool) -> None:
    model = save_tiny_model(tmp_path, num_classes=num_classes)
    rename_weights(tmp_path, prefix, inner=inner, as_bin=as_bin)
    backbone = load(tmp_path)
    assert_same_weights(backbone.model, model.transformer)
    assert backbone.notes == (f"weights of model {str(tmp_path)!r}: _orig_mod. and module. are removed from their names.",)
    if num_classes:
        assert torch.equal(backbone.head_CD, model.score.weight)
        assert load_classifier(str(tmp_path)).notes == backbone.notes


def test_other_names_are_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    rename_weights(tmp_path, "student.")
    with pytest.raises(ModelError, match=r"weights of model '.*': \d+ are missing, such as h\.0\.attn"):
        load(tmp_path)


def test_a_head_is_kept_for_its_own_classes(tmp_path: Path) -> None:
    names = tuple(NAMES.values())

    def is_kept(class_names: tuple[str, ...] | None) -> bool:
        backbone = load(tmp_path)
        split = split_model(backbone, trainable_blocks=1, num_classes=4, seed=0, class_names=class_names)
        return torch.equal(split.suffix.out_head.weight, backbone.head_CD)

    unnamed = tuple(f"LABEL_{i}" for i in range(4))
    save_tiny_model(tmp_path, num_classes=4, id2label=NAMES)
    assert [is_kept(each) for each in (names, None, unnamed, names[::-1])] == [True, True, True, False]
    save_tiny_model(tmp_path, num_classes=4)
    assert is_kept(names), "the checkpoint's classes have no names"
