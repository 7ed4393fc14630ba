"""The exported tokenizer against training: every kind of tokenizer, under plain `AutoTokenizer`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support.random_tokenizers import END, random_texts, random_tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from agnews_dist.errors import ModelError
from agnews_dist.model.embedded import embedded_tokenizer
from agnews_dist.model.export import export_model
from agnews_dist.model.gpt2 import load_backbone, split_model
from agnews_dist.model.pretrained import can_produce, load_tokenizer
from agnews_dist.model.tokenizer_files import check_export, find_difference, write_tokenizer

pytestmark = pytest.mark.slow
MAX_LENGTH = 12


def save(tokenizer: PreTrainedTokenizerFast, directory: Path) -> str:
    tokenizer.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return str(directory)


def export(tokenizer: PreTrainedTokenizerFast, directory: Path) -> PreTrainedTokenizerFast:
    directory.mkdir()
    write_tokenizer(directory, tokenizer, MAX_LENGTH)
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return AutoTokenizer.from_pretrained(directory)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(source=random_tokenizers(), pad_token=st.sampled_from(["new", "eos"]), seed=st.integers(0, 2**32))
def test_export_reads_texts_as_training_or_is_refused(source: PreTrainedTokenizerFast, pad_token: str, seed: int) -> None:
    with TemporaryDirectory() as folder:
        try:
            tokenizer = load_tokenizer(save(source, Path(folder) / "source"), revision=None, pad_token=pad_token)  # type: ignore[arg-type]
        except ModelError:
            assume(pad_token == "new")  # the other one may be refused
            raise
        check_export(tokenizer, MAX_LENGTH, name="random")
        exported = export(tokenizer, Path(folder) / "export")
        texts = random_texts(seed)
        assert find_difference(tokenizer, exported, texts, MAX_LENGTH) is None
        ids = {number for row in exported(texts)["input_ids"] for number in row}
        assert tokenizer.pad_token_id not in ids, "no text has the pad token"


def byte_level(*, template: str | None = None, merges: tuple[tuple[str, str], ...] = ()) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [END, *alphabet, *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    backend.add_special_tokens([END])
    if template:
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[(END, 0)])
    return backend


@pytest.mark.parametrize("template", [f"$A {END}", f"{END} $A"])
def test_special_tokens_of_the_post_processor_are_not_exported(tmp_path: Path, template: str) -> None:
    source = PreTrainedTokenizerFast(tokenizer_object=byte_level(template=template), eos_token=END, bos_token=END)
    tokenizer = load_tokenizer(save(source, tmp_path / "source"), revision=None, pad_token="new")
    assert 0 in tokenizer("a")["input_ids"], "control: a plain call adds it"
    exported = export(tokenizer, tmp_path / "export")
    assert exported("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]
    assert 0 not in exported(f"a {END} b")["input_ids"]
    settings = json.loads((tmp_path / "export" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast", "transformers 4 knows no TokenizersBackend"
    assert settings["add_prefix_space"] is True


def test_check_refuses_another_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = embedded_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    check_export(tokenizer, MAX_LENGTH, name="embedded")
    # A setting of the exported tokenizer that is not that of training.
    monkeypatch.setattr(json, "dumps", lambda content, **options: _dumps(_with_special_tokens(content), **options))
    with pytest.raises(ModelError, match=r"tokenizer of 'embedded': its export cannot be used: it reads '.*' as other tokens"):
        check_export(tokenizer, MAX_LENGTH, name="embedded")


_dumps = json.dumps


def _with_special_tokens(content: dict) -> dict:
    return content | {"split_special_tokens": False} if "split_special_tokens" in content else content


@pytest.mark.parametrize(("token", "is_produced"), [(END, False), ("!", True), ("ab", True), ("ba", False), ("\u0120", True)])
def test_tokens_that_a_text_can_produce(token: str, is_produced: bool) -> None:
    backend = byte_level(merges=(("a", "b"),))
    tokens = {**backend.get_vocab(with_added_tokens=False), "ba": 900}
    backend.model = models.BPE(tokens, [("a", "b")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)
    assert can_produce(tokenizer, tokenizer.convert_tokens_to_ids(token)) == is_produced


@pytest.mark.parametrize("pad", ["!", "ab"])
def test_a_pad_token_that_texts_contain_is_replaced(tmp_path: Path, pad: str) -> None:
    backend = byte_level(merges=(("a", "b"),))
    backend.add_tokens(["[PAD]"])  # an ordinary token, which texts contain
    source = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=pad)
    tokenizer = load_tokenizer(save(source, tmp_path), revision=None, pad_token="new")
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("[PAD1]", len(source))
    assert tokenizer.pad_token_id not in tokenizer("a! [PAD] [PAD1] ab")["input_ids"]


def test_end_of_text_that_texts_contain_is_refused_as_pad_token(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({END: 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    source = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)
    with pytest.raises(
        ModelError, match=r"data\.pad_token eos: a text can contain '<\|endoftext\|>' .*Set --data\.pad_token new"
    ):
        load_tokenizer(save(source, tmp_path), revision=None, pad_token="eos")


def test_bpe_dropout_is_off(tmp_path: Path) -> None:
    backend = byte_level(merges=(("a", "b"),))
    backend.model.dropout = 0.5
    source = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)
    tokenizer = load_tokenizer(save(source, tmp_path), revision=None, pad_token="new")
    assert len({tuple(tokenizer("ab" * 20)["input_ids"]) for _ in range(20)}) == 1


@pytest.mark.skipif(
    "AGNEWS_TRANSFORMERS4" not in os.environ, reason="AGNEWS_TRANSFORMERS4 names no directory with transformers 4"
)
def test_transformers_4_answers_as_transformers_5(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("embedded", revision=None, pad_token="new")
    backbone = load_backbone("embedded", revision=None, init="pretrained", seed=0, tokenizer=tokenizer)
    classifier = split_model(backbone, trainable_blocks=1, num_classes=3, seed=0)
    directory = tmp_path / "export"
    export_model(directory, classifier, tokenizer, class_names=("a", "b", "c"), max_length=64, card="")
    texts = list(filter(str.strip, random_texts(0, 20)))
    program = (
        "import sys, json; sys.path[:0] = [path for path in sys.argv[2:] if path]; import transformers\n"
        f"classify = transformers.pipeline('text-classification', model={str(directory)!r}, top_k=None, device='cpu')\n"
        "encoded = classify.tokenizer(json.loads(sys.argv[1]), truncation=True, padding=True)['input_ids']\n"
        "answers = classify(json.loads(sys.argv[1]), truncation=True, padding=True)\n"
        "print(json.dumps([transformers.__version__, encoded, answers]))"
    )
    answers = [
        json.loads(
            subprocess.run([sys.executable, "-c", program, json.dumps(texts), path], capture_output=True, check=True).stdout
        )
        for path in (os.environ["AGNEWS_TRANSFORMERS4"], "")
    ]
    assert [answer[0].split(".")[0] for answer in answers] == ["4", "5"]
    assert answers[0][1] == answers[1][1]
    for four, five in zip(answers[0][2], answers[1][2], strict=True):
        assert {entry["label"]: entry["score"] for entry in four} == pytest.approx(
            {entry["label"]: entry["score"] for entry in five}, abs=1e-6
        )
