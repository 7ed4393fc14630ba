"""The exported directory: read by Hugging Face as by its users, and loaded again."""

import json
import os
import resource
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.tiny_models import save_tiny_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

from agnews_dist.data.tokens import TRAINING_ENCODING, TextEncoding, encode
from agnews_dist.errors import ModelError
from agnews_dist.model.export import check_room, export_model, fold_bias, limit_length, load_classifier, run_bytes
from agnews_dist.model.gpt2 import Classifier, load_backbone, split_model
from agnews_dist.model.pretrained import load_tokenizer

# Hugging Face loads and runs every export.
pytestmark = pytest.mark.slow

CLASS_NAMES = ("World", "Sports", "Business", "Sci/Tech")
MAX_LENGTH = 40
TEXTS = [
    "Oil prices rise as <|endoftext|> supply falls",
    "Go",
    "A text that ends in a token of another kind <|endoftext|>",
    "A pad token [PAD] in the middle and at the end [PAD]",
    "The striker scored twice in the second half and the home team won the final in front of a full stadium.",
]


class Exported(NamedTuple):
    """An exported classifier with a large bias and changed weights, as after training."""

    classifier: Classifier
    tokenizer: PreTrainedTokenizerFast
    directory: Path


def disturb(classifier: Classifier) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in classifier.suffix.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
        classifier.suffix.out_head.bias.copy_(torch.tensor([30.0, -12.5, 0.25, 7.0]))


def make(name: str, directory: Path, *, pad_token: str, trainable_blocks: int | str = 1) -> Exported:
    tokenizer = load_tokenizer(name, revision=None, pad_token=pad_token)  # type: ignore[arg-type]
    backbone = load_backbone(name, revision=None, init="pretrained", seed=0, tokenizer=tokenizer)
    classifier = split_model(backbone, trainable_blocks=trainable_blocks, num_classes=4, seed=0)  # type: ignore[arg-type]
    disturb(classifier)
    tokenizer(["some earlier call", "that padded"], padding=True, truncation=True, max_length=3)
    export_model(
        directory, classifier, tokenizer, class_names=CLASS_NAMES, max_length=MAX_LENGTH, card="# A card\n\N{BULLET}\n"
    )
    return Exported(classifier, tokenizer, directory)


@pytest.fixture(scope="module")
def trained_new(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return make(str(shared / "checkpoints" / "gpt2-mini"), tmp_path_factory.mktemp("run") / "model", pad_token="new")


@pytest.fixture(scope="module")
def trained_eos(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return make(str(shared / "checkpoints" / "gpt2-mini"), tmp_path_factory.mktemp("run") / "model", pad_token="eos")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return make("embedded", tmp_path_factory.mktemp("run") / "model", pad_token="new")


def our_logits(
    classifier: Classifier, tokenizer: PreTrainedTokenizerFast, texts: list[str], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
    for part in (classifier.prefix, classifier.suffix):
        part.to(dtype)  # a checkpoint may be stored in half precision
    with torch.no_grad():
        return classifier.logits(encoded["input_ids"], encoded["attention_mask"].sum(dim=1))


def huggingface_logits(directory: Path, texts: list[str], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the logits of model and tokenizer loaded by Hugging Face alone."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval().to(dtype)
    with torch.no_grad():
        return model(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt")).logits


def assert_same_logits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=["trained_new", "trained_eos", "embedded"])
def exported(request: pytest.FixtureRequest) -> Exported:
    return request.getfixturevalue(request.param)


def test_huggingface_computes_our_logits(exported: Exported) -> None:
    ours = our_logits(exported.classifier, exported.tokenizer, TEXTS)
    theirs = huggingface_logits(exported.directory, TEXTS)
    assert ours[:, 0].min() > 20, "the bias is in the logits"
    assert_same_logits(theirs, ours)
    without_bias = ours - exported.classifier.suffix.out_head.bias.detach()
    assert (theirs - without_bias).abs().max() > 20, "control: without the bias the logits are very different"


def test_pipeline_returns_class_names(exported: Exported) -> None:
    classify = pipeline("text-classification", model=str(exported.directory))
    answers = classify(TEXTS, truncation=True, top_k=None, batch_size=3)
    expected = our_logits(exported.classifier, exported.tokenizer, TEXTS).softmax(dim=-1)
    assert len(answers) == len(TEXTS)
    for answer, probabilities in zip(answers, expected, strict=True):
        assert {item["label"] for item in answer} == set(CLASS_NAMES)
        for item in answer:
            assert item["score"] == pytest.approx(probabilities[CLASS_NAMES.index(item["label"])].item(), abs=1e-5)
    assert classify("word " * 2000, truncation=True)[0]["label"] in CLASS_NAMES


def test_files_and_config(exported: Exported) -> None:
    config = json.loads((exported.directory / "config.json").read_text())
    assert config["architectures"] == ["GPT2ForSequenceClassification"]
    assert config["dtype"] == "float32"
    assert config["id2label"] == {str(i): name for i, name in enumerate(CLASS_NAMES)}
    assert config["label2id"] == {name: i for i, name in enumerate(CLASS_NAMES)}
    assert config["pad_token_id"] == exported.tokenizer.pad_token_id is not None
    assert config["vocab_size"] == exported.classifier.prefix.wte.num_embeddings
    assert (exported.directory / "README.md").read_text(encoding="utf-8") == "# A card\n\N{BULLET}\n"
    with safe_open(exported.directory / "model.safetensors", "pt") as file:
        assert len(list(file.keys())) == 12 * config["n_layer"] + 5
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118
    assert sorted(path.name for path in exported.directory.parent.iterdir()) == ["model"], "no temporary files are left"


def test_model_files_are_those_that_hugging_face_saves(exported: Exported, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(exported.directory).save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        is_same = (tmp_path / name).read_bytes() == (exported.directory / name).read_bytes()
        assert is_same, name


def test_exported_tokenizer_splits_special_tokens_and_keeps_no_call_options(exported: Exported) -> None:
    """transformers 5.23 loads `split_special_tokens` but its save_pretrained forgets it."""
    tokenizer = AutoTokenizer.from_pretrained(exported.directory)
    assert tokenizer.model_max_length == MAX_LENGTH
    assert tokenizer.padding_side == "right"
    assert tokenizer.split_special_tokens
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (exported.tokenizer.pad_token, exported.tokenizer.pad_token_id)
    special = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert not special & set(ids)
        assert tokenizer.decode(ids) == text
    backend = json.loads((exported.directory / "tokenizer.json").read_text(encoding="utf-8"))
    assert (backend["truncation"], backend["padding"]) == (None, None), "options of an earlier call are not exported"
    settings = json.loads((exported.directory / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only", "name_or_path"} & set(settings)


@pytest.mark.parametrize("pad_token", ["new", "eos"])
def test_frozen_tensors_are_bit_equal_to_the_source(request: pytest.FixtureRequest, shared: Path, pad_token: str) -> None:
    trained: Exported = request.getfixturevalue(f"trained_{pad_token}")
    source = load_file(shared / "checkpoints" / "gpt2-mini" / "model.safetensors")
    written = load_file(trained.directory / "model.safetensors")
    frozen = [name for name in source if not name.startswith(("transformer.h.5.", "transformer.ln_f.", "lm_head."))]
    assert len(frozen) == 5 * 12 + 2
    for name in frozen:
        assert torch.equal(written[name][:50257], source[name].float()), name
    trained_names = [name for name in source if name.startswith(("transformer.h.5.", "transformer.ln_f."))]
    assert len(trained_names) == 14
    for name in trained_names:
        assert not torch.equal(written[name], source[name].float()), name


def test_low_precision_copies_are_not_what_is_exported(tmp_path: Path, embedded: Exported) -> None:
    """On a GPU the frozen part computes in bf16; the export contains the stored weights."""
    tokenizer = load_tokenizer("embedded", revision=None, pad_token="new")
    backbone = load_backbone("embedded", revision=None, init="pretrained", seed=0, tokenizer=tokenizer)
    classifier = split_model(backbone, trainable_blocks=1, num_classes=4, seed=0)
    disturb(classifier)
    classifier.prefix.to(torch.bfloat16)
    arguments = {"class_names": CLASS_NAMES, "max_length": MAX_LENGTH, "card": ""}
    export_model(tmp_path / "model", classifier, tokenizer, **arguments)  # type: ignore[arg-type]
    expected = load_file(embedded.directory / "model.safetensors")
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor), name


@pytest.mark.parametrize("trainable_blocks", [0, "all"])
def test_every_split_exports_the_whole_model(tmp_path: Path, trainable_blocks: int | str) -> None:
    made = make("embedded", tmp_path / "model", pad_token="eos", trainable_blocks=trainable_blocks)
    assert_same_logits(huggingface_logits(made.directory, TEXTS), our_logits(made.classifier, made.tokenizer, TEXTS))


def test_export_changes_neither_random_state_nor_arguments(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer("embedded", revision=None, pad_token="new")
    backbone = load_backbone("embedded", revision=None, init="pretrained", seed=0, tokenizer=tokenizer)
    classifier = split_model(backbone, trainable_blocks=1, num_classes=4, seed=0)
    disturb(classifier)
    before = {name: tensor.clone() for name, tensor in classifier.suffix.state_dict().items()}
    random_state, settings = torch.get_rng_state(), (tokenizer.model_max_length, classifier.config.to_dict())
    capfd.readouterr()
    export_model(tmp_path / "model", classifier, tokenizer, class_names=CLASS_NAMES, max_length=9, card="")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (tokenizer.model_max_length, classifier.config.to_dict()) == settings
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.suffix.state_dict().items())
    assert all(weight.requires_grad for weight in classifier.suffix.parameters())
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_an_older_export_is_replaced_whole(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "stale.txt").write_text("from another run")
    made = make("embedded", directory, pad_token="new")
    assert not (directory / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert load_classifier(str(made.directory))[2] == CLASS_NAMES


def test_a_failed_export_leaves_the_older_one(tmp_path: Path) -> None:
    made = make("embedded", tmp_path / "model", pad_token="new")
    before = load_file(made.directory / "model.safetensors")
    with torch.no_grad():  # of rank 1, and a bias outside its range even without the mean
        made.classifier.suffix.out_head.weight.copy_(torch.ones(4, 1) * torch.randn(1, 128))
    arguments = {"class_names": CLASS_NAMES, "max_length": MAX_LENGTH, "card": ""}
    with pytest.raises(ModelError, match="does not fold"):
        export_model(made.directory, made.classifier, made.tokenizer, **arguments)  # type: ignore[arg-type]
    after = load_file(made.directory / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_directory_that_cannot_be_written(tmp_path: Path, embedded: Exported) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelError, match=r"cannot be written to .*file/model: .*Free some space, or choose"):
        export_model(
            tmp_path / "file" / "model",
            embedded.classifier,
            embedded.tokenizer,
            class_names=CLASS_NAMES,
            max_length=MAX_LENGTH,
            card="",
        )


def test_a_full_disk_is_an_error_of_the_user(tmp_path: Path, embedded: Exported) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        # safetensors has an error of its own.
        with pytest.raises(ModelError, match=r"the model cannot be written to .*: .*File too large.*\. Free some space"):
            export_model(
                tmp_path / "model", embedded.classifier, embedded.tokenizer, class_names=CLASS_NAMES, max_length=9, card=""
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_room_is_checked_before_training(tmp_path: Path) -> None:
    check_room(tmp_path, 1_000_000)
    refusal = r"run\.dir .*free, the model and the checkpoints take 24,000,000,000\.0 GB\. Free some space, lower --checkpoint"
    for directory in (tmp_path, tmp_path / "not yet there"):
        with pytest.raises(ModelError, match=refusal):
            check_room(directory, run_bytes(10**18, 10**18, 1))
    with pytest.raises(ModelError, match=r"run\.dir '.*udcff': its path is not UTF-8\. Set --run\.dir to another"):
        check_room(tmp_path / os.fsdecode(b"\xff"), 1)


@pytest.mark.parametrize(
    ("num_files", "num_free", "is_refused"),
    [(1000, 63, True), (1000, 64, False), (0, 0, False), (10**9, 0, False)],
    ids=["few", "enough", "not counted", "a bucket mounted by rclone"],
)
def test_inodes_are_checked_where_they_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_files: int, num_free: int, is_refused: bool
) -> None:
    values = list(os.statvfs(tmp_path))
    values[5:8] = num_files, num_free, num_free
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(values))
    refusal = pytest.raises(ModelError, match=r"run\.dir .*: 63 inodes are free\. Remove files, or set")
    with refusal if is_refused else nullcontext():
        check_room(tmp_path, 1)


# --- folding of the bias, against the equation


def head(num_classes: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight_CD = 0.02 * torch.randn(num_classes, width, generator=generator)
    return weight_CD, 3 * torch.randn(num_classes, generator=generator), torch.randn(width, generator=generator)


def test_fold_is_the_minimum_norm_solution() -> None:
    weight_CD, bias_C, norm_bias_D = head(4, 64)
    shift_D = fold_bias(weight_CD, bias_C, norm_bias_D).double() - norm_bias_D.double()
    weight = weight_CD.double()
    assert (weight @ shift_D - bias_C.double()).abs().max() < 1e-5
    closed_form_D = weight.T @ torch.linalg.solve(weight @ weight.T, bias_C.double())
    assert (shift_D - closed_form_D).abs().max() < 1e-5


def test_fold_of_no_bias_changes_nothing() -> None:
    weight_CD, bias_C, norm_bias_D = head(4, 64)
    assert torch.equal(fold_bias(weight_CD, torch.zeros_like(bias_C), norm_bias_D), norm_bias_D)


def test_fold_into_a_head_without_mean_keeps_probabilities() -> None:
    """Rows that sum to zero can represent every bias but its mean, which changes no probability."""
    weight_CD, bias_C, norm_bias_D = head(4, 64)
    weight_CD = weight_CD - weight_CD.mean(dim=0)
    folded_D = fold_bias(weight_CD, bias_C, norm_bias_D)
    last_BD = torch.randn(9, 64, generator=torch.Generator().manual_seed(2)).double()
    exact_BC = (last_BD + norm_bias_D) @ weight_CD.T.double() + bias_C
    folded_BC = (last_BD + folded_D) @ weight_CD.T.double()
    assert (exact_BC - folded_BC).abs().max() > 0.01, "the logits differ by the mean ..."
    torch.testing.assert_close(folded_BC.softmax(-1), exact_BC.softmax(-1), rtol=1e-5, atol=1e-6)


def test_fold_fails_without_a_solution() -> None:
    with pytest.raises(
        ModelError, match=r"residual \S+ with 9 classes and width 4\. Use a model wider than its number of classes"
    ):
        fold_bias(*head(9, 4))


def test_fold_fails_if_fp32_is_not_precise_enough() -> None:
    """Almost parallel rows need a huge shift, whose rounding to fp32 would change the logits."""
    weight_CD, bias_C, norm_bias_D = head(2, 16)
    weight_CD[1] = weight_CD[0] + 1e-9 * torch.arange(16)
    with pytest.raises(ModelError, match="does not fold"):
        fold_bias(weight_CD, bias_C, norm_bias_D)


# --- loading an export


def test_loading_an_export_gives_the_same_classifier(exported: Exported) -> None:
    classifier, tokenizer, class_names, max_length, encoding, _ = load_classifier(str(exported.directory.parent))
    assert (class_names, max_length, encoding) == (CLASS_NAMES, MAX_LENGTH, TRAINING_ENCODING)
    assert len(tokenizer) == len(exported.tokenizer)
    assert tokenizer.pad_token_id == exported.tokenizer.pad_token_id
    assert not classifier.suffix.training
    assert not classifier.suffix.out_head.bias.any()
    assert list(classifier.suffix.h) == list(exported.classifier.suffix.h), "split where training split it"
    assert_same_logits(our_logits(classifier, tokenizer, TEXTS), our_logits(exported.classifier, exported.tokenizer, TEXTS))


def test_loading_a_classifier_of_hugging_face(tmp_path: Path) -> None:
    """Load a model that Hugging Face alone has written: no pad token, a tokenizer without a limit, default class names."""
    torch.manual_seed(0)
    load_tokenizer("embedded", revision=None, pad_token="eos").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["pad_token"], settings["model_max_length"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    shape = {"vocab_size": 2000, "n_positions": 48, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0}
    model = GPT2ForSequenceClassification(GPT2Config(**shape, eos_token_id=0, num_labels=3)).eval()
    model.save_pretrained(tmp_path)

    classifier, tokenizer, class_names, max_length, encoding, _ = load_classifier(str(tmp_path))
    assert (class_names, max_length) == (("LABEL_0", "LABEL_1", "LABEL_2"), 48)
    assert encoding == TextEncoding(splits_special_tokens=False)
    for text in TEXTS:
        ids = tokenizer(text, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = model(input_ids=ids).logits
        assert_same_logits(our_logits(classifier, tokenizer, [text]), expected)


def test_loading_a_language_model_fails(shared: Path) -> None:
    name = str(shared / "checkpoints" / "gpt2-mini")
    with pytest.raises(ModelError, match=r"gpt2-mini' has no classification head: .*random.*Set --model.name to a run's"):
        load_classifier(name)
    with pytest.raises(ModelError, match=r"'embedded' has no classification head: .*Set --model.name"):
        load_classifier("embedded")


def test_loading_a_regression_fails(tmp_path: Path) -> None:
    load_tokenizer("embedded", revision=None, pad_token="eos").save_pretrained(tmp_path)
    shape = {"vocab_size": 2000, "n_positions": 48, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0}
    GPT2ForSequenceClassification(GPT2Config(**shape, eos_token_id=0, num_labels=1)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has a single class: .*Set --model.name to a model with two"):
        load_classifier(str(tmp_path))


@pytest.mark.skipif(os.name != "posix", reason="permissions of directories are a POSIX matter")
def test_the_export_is_readable_by_others(embedded: Exported) -> None:
    """Modes follow the umask, unlike those of private temporary files."""
    umask = os.umask(0)
    os.umask(umask)
    assert embedded.directory.stat().st_mode & 0o777 == 0o777 & ~umask
    assert (embedded.directory / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


# --- classifiers made elsewhere


ODD_TEXTS = [*TEXTS, "<|endoftext|>", "a <|endoftext|><|endoftext|>", "<|endoftext|> begins"]
ODD_TEXTS += ["long " * 100, "long <|endoftext|>" * 60]


@pytest.mark.parametrize(
    "template", [None, "$A <|endoftext|>", "<|endoftext|> $A", "<|endoftext|> $A <|endoftext|>", "<|endoftext|>:1 $A:1"]
)
@pytest.mark.parametrize(
    "changes",
    [
        {"pad_token_id": 0},
        {"pad_token_id": None},
        {"pad_token_id": 70, "tokenizer_split_special_tokens": True},
        {"pad_token_id": 0, "tokenizer_truncation_side": "left", "tokenizer_padding_side": "left"},
        {"pad_token_id": 0, "tokenizer_model_input_names": ["input_ids", "token_type_ids", "attention_mask"]},
    ],
)
def test_predictions_are_those_of_the_pipeline(tmp_path: Path, template: str | None, changes: dict[str, object]) -> None:
    save_tiny_model(tmp_path, num_classes=4, template=template, tokenizer_model_max_length=64, **changes)
    classify = pipeline("text-classification", model=str(tmp_path), top_k=None)
    saved = load_classifier(str(tmp_path))
    for text in ODD_TEXTS:
        [ids], _ = encode(saved.tokenizer, [text], saved.max_length, encoding=saved.encoding)
        with torch.no_grad():
            ours = saved.classifier.logits(torch.tensor([ids]), torch.tensor([len(ids)])).softmax(-1)[0]
        theirs = {answer["label"]: answer["score"] for answer in classify([text], truncation=True)[0]}
        expected = torch.tensor([theirs[name] for name in saved.class_names])
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5, msg=lambda message, text=text: f"{text!r}: {message}")


def test_tokenizers_whose_answers_would_differ_are_refused(tmp_path: Path) -> None:
    names = ["input_ids", "token_type_ids"]
    save_tiny_model(tmp_path, num_classes=4, template="<|endoftext|>:0 $A:1", tokenizer_model_input_names=names)
    with pytest.raises(ModelError, match=r"it gives the token types \[0, 1\] to one text, and only one is supported\. Remove"):
        load_classifier(str(tmp_path))
    template = "<|endoftext|> $A <|endoftext|>"
    for length in ("64", -1, 0, 12.5, True, 1):
        save_tiny_model(tmp_path, num_classes=4, template=template, tokenizer_model_max_length=length)
        with pytest.raises(ModelError, match=rf"its model_max_length is {length!r}, and it adds 2 tokens to a text\. Correct"):
            load_classifier(str(tmp_path))
    save_tiny_model(tmp_path, num_classes=4, template=template, tokenizer_model_max_length=1e30)
    saved = load_classifier(str(tmp_path))
    assert (saved.max_length, limit_length(saved, 2).max_length) == (64, 2)
    with pytest.raises(ModelError, match=r"data\.max_length 1: the tokenizer adds 2 tokens to a text\. Set --data\.max_len"):
        limit_length(saved, 1)


@pytest.mark.parametrize(
    "odd",
    [
        {"output_attentions": True, "return_dict": False},
        {"_attn_implementation": "flash_attention_2", "auto_map": {}},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    ],
)
def test_unusual_models_are_exported_as_usual_ones(tmp_path: Path, odd: dict[str, object]) -> None:
    (tmp_path / "source").mkdir()
    save_tiny_model(tmp_path / "source", **odd, dtype="float16")
    made = make(str(tmp_path / "source"), tmp_path / "model", pad_token="new")
    # Attention without a scale amplifies the rounding of either side beyond the tolerance, on some processors.
    ours = our_logits(made.classifier, made.tokenizer, TEXTS, torch.float64)
    assert_same_logits(huggingface_logits(made.directory, TEXTS, torch.float64), ours)
    config = json.loads((made.directory / "config.json").read_text())
    assert (config["scale_attn_weights"], config["scale_attn_by_inverse_layer_idx"]) == (True, False)


@pytest.mark.parametrize(("num_classes", "has_bias"), [(64, True), (65, False), (150, False), (300, False)])
def test_many_classes_have_a_bias_only_if_it_folds(tmp_path: Path, num_classes: int, has_bias: bool) -> None:
    """The embedded model has width 128."""
    tokenizer = load_tokenizer("embedded", revision=None, pad_token="new")
    backbone = load_backbone("embedded", revision=None, init="pretrained", seed=0, tokenizer=tokenizer)
    classifier = split_model(backbone, trainable_blocks=1, num_classes=num_classes, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in classifier.suffix.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    assert (classifier.suffix.out_head.bias is not None) == has_bias
    names = [f"topic {i}" for i in range(num_classes)]
    export_model(tmp_path / "model", classifier, tokenizer, class_names=names, max_length=MAX_LENGTH, card="")
    ours = our_logits(classifier, tokenizer, TEXTS).softmax(-1)
    torch.testing.assert_close(huggingface_logits(tmp_path / "model", TEXTS).softmax(-1), ours, rtol=1e-4, atol=1e-7)
    assert load_classifier(str(tmp_path)).class_names == tuple(names)


def test_torch_export_takes_the_model_as_it_is(embedded: Exported) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(embedded.directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(embedded.directory)

    def batch(*texts: str) -> dict[str, torch.Tensor]:
        return dict(tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True))

    free = {0: torch.export.Dim("texts", min=2, max=64), 1: torch.export.Dim("tokens", min=2, max=256)}
    given = batch("The coach left the club", "Oil")
    program = torch.export.export(model, (), given, dynamic_shapes=dict.fromkeys(given, free), strict=False).module()
    other = batch("A probe on the moon, said the agency", "A vote", "Go")
    with torch.no_grad():
        outputs = model(**other)
        assert list(outputs) == ["logits"], "no cache"
        torch.testing.assert_close(program(**other).logits, outputs.logits)


def test_trained_embeddings_are_exported_and_loaded_as_trained(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("embedded", revision=None, pad_token="new")
    backbone = load_backbone("embedded", revision=None, init="pretrained", seed=0, tokenizer=tokenizer)
    before = backbone.model.wte.weight.detach().clone()
    classifier = split_model(backbone, trainable_blocks="all", num_classes=4, seed=0, train_embeddings=True)
    disturb(classifier)
    export_model(tmp_path / "model", classifier, tokenizer, class_names=CLASS_NAMES, max_length=MAX_LENGTH, card="# x\n")
    ours = our_logits(classifier, tokenizer, TEXTS)
    assert_same_logits(huggingface_logits(tmp_path / "model", TEXTS), ours)
    saved = load_file(tmp_path / "model" / "model.safetensors")["transformer.wte.weight"]
    assert torch.equal(saved, classifier.suffix.wte.weight)
    assert (saved - before).abs().max() > 0.05
    loaded = load_classifier(str(tmp_path / "model")).classifier
    assert loaded.suffix.has_embeddings, "under bf16 what was trained stays in fp32"
    assert_same_logits(our_logits(loaded, tokenizer, TEXTS), ours)
    # Another training may freeze them again.
    again = load_backbone(str(tmp_path / "model"), revision=None, init="pretrained", seed=0, tokenizer=tokenizer)
    frozen = split_model(again, trainable_blocks="all", num_classes=4, seed=0)
    export_model(tmp_path / "next", frozen, tokenizer, class_names=CLASS_NAMES, max_length=MAX_LENGTH, card="# x\n")
    assert json.loads((tmp_path / "next" / "config.json").read_text())["train_embeddings"] is False
