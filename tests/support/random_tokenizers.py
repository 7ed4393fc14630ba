"""Random tokenizers of every kind, as a strategy of hypothesis, and random texts for them."""

import random
from typing import Any

from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
WORDS = ["oil", "bank", "goal", "the", "Moon", "over", "a", "b"]
_NORMALIZERS = (None, normalizers.NFC, normalizers.NFKD, normalizers.Lowercase, normalizers.StripAccents)
_PRE_TOKENIZERS = (None, pre_tokenizers.Whitespace, pre_tokenizers.WhitespaceSplit, pre_tokenizers.Metaspace)
_PADS = (None, END, "[PAD]", "!", "oil", "[UNK]", "pad it")


def random_texts(seed: int, number: int = 100) -> list[str]:
    """Return texts of words, special tokens, and odd characters."""
    rng = random.Random(seed)
    odd = ["caf\u00e9", "\U0001f600", "\u4e2d", "\ufb01", "##l", "\u2581", "1,5", " ", "  ", "\n"]
    parts = [*WORDS, END, "[PAD]", "[UNK]", "<extra>", "!", "pad it", "[PAD1]", *odd]
    return [rng.choice(["", " "]).join(rng.choices(parts, k=rng.randint(0, 12))) for _ in range(number)]


def _build_model(kind: str, letters: list[str], *, has_byte_alphabet: bool, ends_in_vocabulary: bool) -> Any:
    tokens = ["[UNK]", *([END, "[PAD]", "<extra>"] if ends_in_vocabulary else []), *letters, "!"]
    if kind == "BPE":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if has_byte_alphabet else []
        tokens += [letter for letter in alphabet if letter not in tokens]
        pairs = [(word[:i], word[i]) for word in WORDS for i in range(1, len(word))]
        merges = list(dict.fromkeys(pairs))
        tokens += [token for left, right in merges if (token := left + right) not in tokens]
        tokens = list(dict.fromkeys(tokens))
        return models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="[UNK]")
    tokens = list(dict.fromkeys([*tokens, *WORDS, *(f"##{letter}" for letter in letters)]))
    numbered = {token: i for i, token in enumerate(tokens)}
    if kind == "WordLevel":
        return models.WordLevel(numbered, unk_token="[UNK]")
    if kind == "WordPiece":
        return models.WordPiece(numbered, unk_token="[UNK]")
    return models.Unigram([(token, -float(i)) for i, token in enumerate(tokens)], unk_id=0)


@st.composite
def random_tokenizers(draw: st.DrawFn) -> PreTrainedTokenizerFast:
    kind = draw(st.sampled_from(["BPE", "WordLevel", "WordPiece", "Unigram"]))
    is_byte_level = draw(st.booleans())
    letters = sorted({letter for word in WORDS for letter in word})
    backend = Tokenizer(_build_model(kind, letters, has_byte_alphabet=is_byte_level, ends_in_vocabulary=draw(st.booleans())))
    if normalizer := draw(st.sampled_from(_NORMALIZERS)):
        backend.normalizer = normalizer()
    if is_byte_level:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=draw(st.booleans()))
        backend.decoder = decoders.ByteLevel()
    elif before := draw(
        st.sampled_from([None, pre_tokenizers.Whitespace, pre_tokenizers.WhitespaceSplit, pre_tokenizers.Metaspace])
    ):
        backend.pre_tokenizer = before()
    for content in draw(st.sets(st.sampled_from(["<extra>", "pad it", "oil!", "[PAD]", END]))):
        flags = {name: draw(st.booleans()) for name in ("special", "lstrip", "rstrip", "single_word", "normalized")}
        backend.add_tokens([AddedToken(content, **flags)])
    if backend.token_to_id(END) is None:
        backend.add_special_tokens([END])
    template = draw(st.sampled_from([None, f"$A {END}", f"{END} $A", "$A", "bytes", "both"]))
    special = [(END, backend.token_to_id(END))]
    if template == "bytes":
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    elif template == "both":
        parts = [processors.ByteLevel(), processors.TemplateProcessing(single=f"{END} $A {END}", special_tokens=special)]
        backend.post_processor = processors.Sequence(parts)
    elif template:
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    pad = draw(st.sampled_from(_PADS))
    settings: dict[str, Any] = {"add_bos_token": True} if draw(st.booleans()) else {}
    settings |= {"pad_token": pad} if pad else {}
    sides = {name: draw(st.sampled_from(["left", "right"])) for name in ("padding_side", "truncation_side")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, bos_token=END, **sides, **settings)
