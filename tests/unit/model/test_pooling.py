"""Mean pooling against Hugging Face's GPT2Model and a mean in plain torch, and its export with its own code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.processes import environment
from support.random_gpt2 import NUM_CLASSES, assert_close, mask_of, ours_like, ragged_batch, random_reference
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2ForSequenceClassification, pipeline

from agnews_dist.model.export import MODELING_FILE, export_model, load_classifier
from agnews_dist.model.gpt2 import explain_new_head, load_backbone, split_model
from agnews_dist.model.pooling import average_packed, average_padded
from agnews_dist.model.pretrained import load_tokenizer

BOTH_PATHS = pytest.mark.parametrize("fast_path", [True, False], ids=["fast", "plain"])
TEXTS = ["Oil prices rise as supply falls", "Go", "The striker scored twice in the second half and the home team won."]


def reference_logits(reference: GPT2ForSequenceClassification, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """Return score(mean over the real tokens of the final norm's output), text by text and without padding."""
    rows = [
        reference.transformer(tokens_BT[row : row + 1, :length]).last_hidden_state[0].mean(dim=0)
        for row, length in enumerate(lengths_B)
    ]
    return reference.score(torch.stack(rows))


@BOTH_PATHS
@pytest.mark.parametrize("trainable_blocks", [0, 1, 2, "all"])
def test_logits_and_gradients_equal_hugging_face_and_a_mean(trainable_blocks: int | str, fast_path: bool) -> None:
    reference = random_reference(pad_token_id=0)
    tokens_BT, lengths_B = ragged_batch([3, 1, 17, 9, 9], low=1, high=97, pad_id=0)
    classifier = ours_like(reference, trainable_blocks, fast_path=fast_path, pooling="mean")
    labels_B = torch.arange(len(lengths_B)) % NUM_CLASSES
    expected_BC = reference_logits(reference, tokens_BT, lengths_B)
    functional.cross_entropy(expected_BC, labels_B).backward()
    logits_BC = classifier.logits(tokens_BT, lengths_B)
    functional.cross_entropy(logits_BC, labels_B).backward()
    assert_close(logits_BC.detach(), expected_BC.detach(), "logits")
    last_BC = reference(input_ids=tokens_BT, attention_mask=mask_of(tokens_BT, lengths_B)).logits
    assert (last_BC - expected_BC).abs().max() > 0.1, "control: the last token has other logits"
    gradients = {name.removeprefix("transformer."): weight.grad for name, weight in reference.named_parameters()}
    trained = dict(classifier.suffix.named_parameters())
    assert len(trained) == 12 * len(classifier.suffix.h) + 4
    for name, weight in trained.items():
        if name != "out_head.bias":
            assert_close(weight.grad, gradients[name.replace("out_head", "score")], name)  # type: ignore[arg-type]


@BOTH_PATHS
@pytest.mark.parametrize("trainable_blocks", [0, 2])
def test_padding_and_batch_mates_do_not_change_a_mean(trainable_blocks: int, fast_path: bool) -> None:
    classifier = ours_like(random_reference(), trainable_blocks, fast_path=fast_path, pooling="mean")
    tokens_BT, lengths_B = ragged_batch([1, 4, 11, 7], low=1, high=97, pad_id=0)
    with torch.no_grad():
        together_BC = classifier.logits(tokens_BT, lengths_B)
        longer_BT = functional.pad(tokens_BT, (0, 9), value=50)
        assert_close(classifier.logits(longer_BT, lengths_B), together_BC, "nine more columns")
        for row, length in enumerate(lengths_B.tolist()):
            alone_BC = classifier.logits(tokens_BT[row : row + 1, :length], lengths_B[row : row + 1])
            assert_close(alone_BC[0], together_BC[row], f"row {row} alone")


def test_frozen_blocks_alone_give_one_row_per_text() -> None:
    classifier = ours_like(random_reference(), 0, pooling="mean")
    prefix = classifier.prefix
    assert (prefix.one_row_per_text, prefix.computes_means, classifier.suffix.reads_means) == (True, True, True)
    tokens_BT, lengths_B = ragged_batch([5, 5, 8], low=1, high=97, pad_id=0)
    features = prefix.features(tokens_BT, lengths_B)
    assert features.hidden_BTD.shape == (3, 1, 24)
    assert features.lengths_B.tolist() == [1, 1, 1]
    above = ours_like(random_reference(), 1, pooling="mean")
    assert not above.prefix.one_row_per_text, "a block above reads every token"
    classifier.use_fast_path(False)
    assert not prefix.one_row_per_text


def test_packed_and_padded_means_agree_and_ignore_padding() -> None:
    lengths, generator = [4, 4, 4, 1, 6], torch.Generator().manual_seed(0)
    texts = [torch.randn(length, 12, generator=generator) for length in lengths]
    packed_BD = average_packed(torch.cat(texts), lengths, 1e-5)
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=7.0)
    assert_close(average_padded(padded, torch.tensor(lengths), 1e-5), packed_BD, "means")
    for row, text in enumerate(texts):
        assert torch.equal(average_packed(text, [len(text)], 1e-5)[0], packed_BD[row]), "other texts change no bit"


def export_mean(directory: Path, trainable_blocks: int = 1) -> Path:
    tokenizer = load_tokenizer("embedded", revision=None, pad_token="new")
    backbone = load_backbone("embedded", revision=None, init="pretrained", seed=0, tokenizer=tokenizer)
    classifier = split_model(backbone, trainable_blocks=trainable_blocks, num_classes=4, seed=0, pooling="mean")
    with torch.no_grad():
        for weight in classifier.suffix.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    export_model(directory / "model", classifier, tokenizer, class_names=("a", "b", "c", "d"), max_length=40, card="# x\n")
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.save(classifier.logits(encoded["input_ids"], encoded["attention_mask"].sum(dim=1)), directory / "logits.pt")
    return directory


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_mean(tmp_path_factory.mktemp("run"))


@pytest.mark.slow
def test_hugging_face_computes_our_logits_with_the_exported_code(exported: Path) -> None:
    directory, expected_BC = exported / "model", torch.load(exported / "logits.pt")
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "gpt2_mean_pooling"
    assert (directory / MODELING_FILE).is_file()
    model = AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=True).eval()
    encoded = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model(**encoded, labels=torch.tensor([0, 1, 2]))
        without_mask_BC = model(input_ids=encoded["input_ids"]).logits
    torch.testing.assert_close(found.logits, expected_BC, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(without_mask_BC, expected_BC, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, functional.cross_entropy(expected_BC, torch.tensor([0, 1, 2])))
    answers = pipeline("text-classification", model=str(directory), trust_remote_code=True)(
        TEXTS, truncation=True, batch_size=2
    )
    best = expected_BC.softmax(dim=-1).max(dim=-1)
    assert [answer["label"] for answer in answers] == ["abcd"[i] for i in best.indices]
    assert [answer["score"] for answer in answers] == pytest.approx(best.values.tolist(), abs=1e-5)


@pytest.mark.slow
def test_hugging_face_refuses_the_model_without_its_code(exported: Path) -> None:
    # Not interactive: at a terminal it asks.
    code = "import sys; from transformers import pipeline; pipeline('text-classification', model=sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(exported / "model")],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "trust_remote_code=True" in done.stderr


def test_our_loader_needs_no_trust_and_keeps_the_pooling(exported: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saved = load_classifier(str(exported))
    assert (saved.classifier.suffix.pooling, len(saved.classifier.suffix.h)) == ("mean", 1)
    encoded = saved.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits_BC = saved.classifier.logits(encoded["input_ids"], encoded["attention_mask"].sum(dim=1))
    torch.testing.assert_close(logits_BC, torch.load(exported / "logits.pt"), rtol=1e-5, atol=1e-5)
    assert "trust_remote_code" not in "".join(capfd.readouterr())


def test_a_head_of_another_pooling_is_not_used(exported: Path) -> None:
    tokenizer = load_tokenizer(str(exported), revision=None, pad_token="new")
    backbone = load_backbone(str(exported), revision=None, init="pretrained", seed=0, tokenizer=tokenizer)
    assert explain_new_head(backbone, ("a", "b", "c", "d"), "mean") is None
    assert explain_new_head(backbone, ("a", "b", "c", "d"), "last") == "it was trained with model.pooling mean"
    head_CD = backbone.head_CD
    assert head_CD is not None
    other = split_model(backbone, trainable_blocks=1, num_classes=4, seed=0)
    assert not torch.equal(other.suffix.out_head.weight, head_CD)
