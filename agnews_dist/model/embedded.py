"""The embedded model: tokenizer and config built in memory from synthetic text, without files or network, always the same."""

from functools import cache
from typing import cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

from agnews_dist.data.synthetic import generate

END_OF_TEXT = "<|endoftext|>"
EMBEDDED_SEED = 20_260
"""Seed of the embedded weights and of the tokenizer's training text; independent of the user's seeds."""
_NUM_POSITIONS = 512


@cache
def _train_tokenizer() -> str:
    """Train a byte-level BPE like GPT-2's on the synthetic text; return it as tokenizer.json."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2_000,
        special_tokens=[END_OF_TEXT],
        # All 256 bytes, so that every text can be tokenised.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for text, _ in generate(4_000, EMBEDDED_SEED, "train")), trainer)
    return bpe.to_str()


def embedded_tokenizer() -> PreTrainedTokenizerFast:
    """Return a new copy of the embedded tokenizer: 2,000 tokens, `<|endoftext|>` as start and end token, no pad token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_train_tokenizer()),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=_NUM_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def embedded_config() -> GPT2Config:
    """Return the config of a GPT-2 with 4 blocks of width 128 and the vocabulary of `embedded_tokenizer`."""
    tokenizer = embedded_tokenizer()
    end_of_text = cast(int, tokenizer.eos_token_id)
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=_NUM_POSITIONS,
        n_embd=128,
        n_layer=4,
        n_head=4,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )


def scale_embeddings(model: GPT2Model) -> None:
    """Scale the random embeddings, which stay frozen, so that words differ more than positions.

    GPT-2 draws both at the same scale (`initializer_range`) and learns the rest. Unscaled, the positions hide the words: with
    2,000 synthetic rows and three epochs, validation accuracy was 0.59; at these scales it is 0.90.
    """
    with torch.no_grad():
        model.wte.weight.mul_(0.5 / model.config.initializer_range)
        model.wpe.weight.mul_(0.002 / model.config.initializer_range)
