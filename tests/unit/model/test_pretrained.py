"""Tokenizers from every source, their pad tokens and special tokens, and the errors of sources that cannot be used."""

import shutil
from pathlib import Path

import pytest
from support.processes import python
from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

from agnews_dist.errors import ModelError
from agnews_dist.model.embedded import embedded_tokenizer
from agnews_dist.model.pretrained import load_tokenizer

NUM_TOKENS = 2000
"""Tokens of the embedded tokenizer."""


@pytest.mark.slow
def test_new_pad_token_is_added_once(shared: Path, tmp_path: Path) -> None:
    source = str(shared / "tokenizers" / "gpt2")
    first = load_tokenizer(source, revision=None, pad_token="new")
    assert (len(first), first.pad_token, first.pad_token_id) == (50258, "[PAD]", 50257)
    first.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path), revision=None, pad_token="new")
    assert (len(again), again.pad_token_id) == (50258, 50257)
    reused = load_tokenizer(str(tmp_path), revision=None, pad_token="eos")
    assert (len(reused), reused.pad_token_id) == (50258, 50256)


@pytest.mark.slow
def test_eos_pad_token_adds_no_token(shared: Path) -> None:
    tokenizer = load_tokenizer(str(shared / "tokenizers" / "gpt2"), revision=None, pad_token="eos")
    assert (len(tokenizer), tokenizer.pad_token, tokenizer.pad_token_id) == (50257, "<|endoftext|>", 50256)


@pytest.mark.slow
@pytest.mark.parametrize("pad_token", ["new", "eos"])
@pytest.mark.parametrize("source", ["gpt2", "embedded"])
def test_special_tokens_in_a_text_are_ordinary_text(shared: Path, source: str, pad_token: str) -> None:
    name = "embedded" if source == "embedded" else str(shared / "tokenizers" / "gpt2")
    tokenizer = load_tokenizer(name, revision=None, pad_token=pad_token)  # type: ignore[arg-type]
    text = "before <|endoftext|> between [PAD] after<|endoftext|>"
    ids = tokenizer([text, "a"], padding=True)["input_ids"]
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids[0])
    assert tokenizer.decode(ids[0]) == text
    assert ids[1][-1] == tokenizer.pad_token_id, "padding is on the right"


@pytest.mark.slow
def test_tokenizer_of_a_run_directory(shared: Path, tmp_path: Path) -> None:
    shutil.copytree(shared / "tokenizers" / "gpt2", tmp_path / "model")
    assert len(load_tokenizer(str(tmp_path), revision=None, pad_token="eos")) == 50257


@pytest.mark.slow
def test_embedded_tokenizer_is_the_same_in_every_process() -> None:
    program = "from agnews_dist.model.embedded import embedded_tokenizer as t; print(t().backend_tokenizer.to_str(), end='')"
    expected = load_tokenizer("embedded", revision=None, pad_token="eos")
    other = {"RAYON_NUM_THREADS": "2", "PYTHONHASHSEED": "2"}
    assert python("-c", program, **other).stdout == embedded_tokenizer().backend_tokenizer.to_str()
    assert len(expected) == NUM_TOKENS


def test_embedded_tokenizer_takes_any_text() -> None:
    tokenizer = load_tokenizer("embedded", revision=None, pad_token="new")
    text = "caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{GRINNING FACE}\0 \N{CJK UNIFIED IDEOGRAPH-4E2D}\n  two  spaces"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


def test_tokenizer_errors(tmp_path: Path, shared: Path) -> None:
    with pytest.raises(ModelError, match=r"'/no/such/dir' does not exist: .*Correct the path, or set --model.name"):
        load_tokenizer("/no/such/dir", revision=None, pad_token="new")
    with pytest.raises(ModelError, match=r"it has no tokenizer \(none of tokenizer.json.*Copy the tokenizer's files"):
        load_tokenizer(str(tmp_path), revision=None, pad_token="new")
    with pytest.raises(ModelError, match=r"^model.name 'gpt2': it is neither a directory nor in .*agnews_dist prepare"):
        load_tokenizer("gpt2", revision=None, pad_token="new")
    file = tmp_path / "tokenizer.json"
    file.write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer in .* cannot be read: .*Copy or download"):
        load_tokenizer(str(tmp_path), revision=None, pad_token="new")
    with pytest.raises(ModelError, match=r"tokenizer.json' is a file: .*Set --model.name to its directory"):
        load_tokenizer(str(file), revision=None, pad_token="new")
    no_end = tmp_path / "no_end"
    backend = load_tokenizer("embedded", revision=None, pad_token="new").backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(no_end)
    with pytest.raises(ModelError, match=r"has no end-of-text token: .*Set eos_token"):
        load_tokenizer(str(no_end), revision=None, pad_token="new")


def test_fast_tokenizer_class_of_gpt2() -> None:
    """The annotation `PreTrainedTokenizerFast` is what AutoTokenizer returns for GPT-2."""
    assert issubclass(GPT2TokenizerFast, PreTrainedTokenizerFast)
