"""Config and weights that others have saved: read as transformers reads them, or refused by the name of the field."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import edit_json, keep_lm_head_only, rename_weights, save_tiny_model
from transformers import GPT2Model

from agnews_dist.config.schema import DataConfig, ModelConfig
from agnews_dist.errors import ModelError
from agnews_dist.model.export import load_classifier
from agnews_dist.model.gpt2 import Backbone, explain_new_head, load_backbone, split_model
from agnews_dist.model.pretrained import load_tokenizer, locate
from agnews_dist.model.saved_model import read_config
from agnews_dist.run.model_setup import read_model_files

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
        # transformers itself cannot read it, not even for the tokenizer.
        with pytest.raises(ModelError, match=rf"config\.json of model '.*': {message}"):
            read_model_files(ModelConfig(name=str(tmp_path)), DataConfig())
        return
    # A training does not need the head.
    backbone = load(tmp_path)
    assert (backbone.head_CD, backbone.class_names) == (None, None)
    assert backbone.head_fault is not None
    assert backbone.head_fault in (explain_new_head(backbone, ("a", "b")) or "")
    assert_same_weights(backbone.model, model.transformer)


def test_faultless_heads_load(tmp_path: Path) -> None:
    for changes in ({"id2label": NAMES}, {"problem_type": "single_label_classification"}, {"problem_type": None}):
        save_tiny_model(tmp_path, num_classes=4, **changes)
        assert len(load_classifier(str(tmp_path)).class_names) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad_token_id": "0"}, r"Validation error for field 'pad_token_id'"),
        ({"layer_norm_epsilon": "1e-5"}, r"Validation error for field 'layer_norm_epsilon'.*got str \(value: '1e-5'\)\. Corr"),
        ({"dtype": "float33"}, r"module 'torch' has no attribute 'float33'"),
        ({"n_head": 5}, r"it describes no possible model \(`embed_dim` must be divisible"),
        ({"activation_function": "wiggle"}, r"it describes no possible model \('wiggle'\)"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"it has a quantization_config, and quantised"),
        ({"id2label": None, "label2id": None}, r"id2label has 2 names, the head score\.weight 4 rows and 64 columns\."),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {}}, r"id2label has 3 names, the head score\.weight 4 rows"),
    ],
)
def test_a_wrong_value_is_refused_by_its_file_and_field(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_tiny_model(tmp_path, num_classes=4, **changes)
    with pytest.raises(ModelError, match=rf"^config\.json of model '.*': {message}"):
        load_classifier(str(tmp_path))
    if "id2label" not in changes:
        with pytest.raises(ModelError, match=rf"^config\.json of model '.*': {message}"):
            read_model_files(ModelConfig(name=str(tmp_path)), DataConfig(max_length=64))


@pytest.mark.parametrize("architectures", [None, ["GPT2LMHeadModel"], ["NewsClassifier"]])
def test_a_stored_head_is_used_whatever_the_architecture_is_called(tmp_path: Path, architectures: list[str] | None) -> None:
    model = save_tiny_model(tmp_path, num_classes=4, architectures=architectures)
    assert torch.equal(load(tmp_path).head_CD, model.score.weight)
    rename_weights(tmp_path, "module.")
    assert torch.equal(load(tmp_path).head_CD, model.score.weight)


def test_contradicting_class_numbers_are_said(tmp_path: Path) -> None:
    names = tuple(NAMES.values())
    for label2id, is_said in (({"World": 3}, True), ({"LABEL_0": 0}, False), (dict(zip(names, "0123", strict=True)), False)):
        save_tiny_model(tmp_path, num_classes=4, id2label=NAMES, label2id=label2id)
        saved = load_classifier(str(tmp_path))
        assert saved.class_names == names
        assert any("label2id contradicts id2label, which is used" in note for note in saved.notes) == is_said


def test_weights_keep_the_type_of_their_file(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, dtype="float16")
    assert_same_weights(load(tmp_path).model, model.transformer)
    assert read_config(locate(str(tmp_path), None)).dtype == torch.float16, "the memory estimate needs it"


def test_adapters_and_other_formats_are_named(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "tf_model.h5")
    with pytest.raises(ModelError, match=r"it has no weights \(.*\), only tf_model\.h5, which is not read\. Copy"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"it is a PEFT adapter \(adapter_config\.json\)\. Merge it into its model"):
        load(tmp_path)


def test_a_head_of_other_classes_is_said_not_to_be_used(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, num_classes=4, id2label=NAMES)
    backbone, names = load(tmp_path), tuple(NAMES.values())
    assert explain_new_head(backbone, names) is None
    for other in (names[:3], names[::-1], ("neg", "pos")):
        assert explain_new_head(backbone, other) == f"its 4 classes ({', '.join(names)}) are not those of the data"
    assert explain_new_head(backbone, ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")) is None


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
