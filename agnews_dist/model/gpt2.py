"""GPT-2 from a name to a classifier: load or draw the weights, add a row for [PAD], split at the freeze boundary."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

from agnews_dist.data.hugging_face import silence_transformers
from agnews_dist.data.rows import list_first
from agnews_dist.errors import ModelError
from agnews_dist.model.embedded import EMBEDDED_SEED, embedded_config, scale_embeddings
from agnews_dist.model.pooling import Pooling
from agnews_dist.model.prefix import NoPrefix, Prefix
from agnews_dist.model.pretrained import CONFIG_FILE, EMBEDDED, TOKENIZER_FILES, locate
from agnews_dist.model.saved_model import Backbone, read_config, read_weights
from agnews_dist.model.suffix import Embeddings, Suffix

MAX_SPARE_ROWS = 1024
"""Limit of embedding rows beyond the tokenizer's tokens; checkpoints may be padded to a multiple of up to 1024."""
_BACKBONE_STREAM, _HEAD_STREAM = 0, 1
"""Numbers of the random streams that one seed gives to different parts of the model."""


@dataclass(frozen=True)
class Classifier:
    """A frozen prefix and a trainable suffix, and the stored weights of the prefix for the export."""

    prefix: Prefix
    suffix: Suffix
    config: GPT2Config
    frozen_state: dict[str, Tensor]
    """Hugging Face's name -> frozen weight on the CPU, in the type of its file; moving the prefix does not change them.

    Weights of a safetensors file are its mapped pages, which the ranks of a node share.
    """
    has_drawn_head: bool = True
    """False: `out_head` came with the checkpoint."""

    def logits(self, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Compute logits_BC of right-padded tokens_BT with lengths_B (>= 1)."""
        return cast(Tensor, self.suffix(*self.prefix.features(tokens_BT, lengths_B)))

    def use_fast_path(self, fast_path: bool) -> None:
        """Switch the fast path of both halves, before any features are computed. False is Hugging Face's own forward."""
        self.prefix.fast_path = fast_path
        self.suffix.use_fast_path(fast_path)


def load_backbone(
    name: str,
    *,
    revision: str | None,
    init: Literal["pretrained", "random"],
    seed: int,
    tokenizer: PreTrainedTokenizerFast,
    config: GPT2Config | None = None,
) -> Backbone:
    """Load GPT-2 by hub id, directory, run directory or 'embedded'. The global random state is neither used nor changed.

    With `init` 'random' only the config is read, and the weights are drawn from `seed`. The `tokenizer` decides the number of
    embedding rows. A `config` from `load_model_config` saves reading it again.

    Raises:
        ModelError: no such directory; not in the cache; no config or weights, or damaged, incomplete or non-finite
            ones; not GPT-2; a vocabulary that does not fit the tokenizer.
    """
    config = copy.deepcopy(config) or load_model_config(name, revision=revision, init=init, tokenizer=tokenizer)
    pad_id = config.pad_token_id
    if name == EMBEDDED:
        backbone = Backbone(_draw_weights(config, EMBEDDED_SEED if init == "pretrained" else seed), None, None)
        scale_embeddings(backbone.model)
    elif init == "random":
        backbone = Backbone(_draw_weights(config, seed), None, None)
    else:
        backbone = read_weights(locate(name, revision), config)
    _fit_vocabulary(backbone.model, tokenizer, name)
    return replace(backbone, pad_id=pad_id)


def load_model_config(
    name: str, *, revision: str | None, init: Literal["pretrained", "random"], tokenizer: PreTrainedTokenizerFast
) -> GPT2Config:
    """Load the config of the model that `load_backbone` would load; arguments as there.

    Raises:
        ModelError: no such directory; not in the cache; no config, or not GPT-2's.
    """
    if name == EMBEDDED:
        return embedded_config()
    location = locate(name, revision)
    has_only_tokenizer = not location.has_any(CONFIG_FILE) and location.has_any(*TOKENIZER_FILES)
    if not has_only_tokenizer or init != "random":
        return read_config(location)
    # GPT-2 small, without the row of [PAD] that `_fit_vocabulary` adds: so both pad tokens give the same drawn weights.
    num_rows = len(tokenizer) - int(_has_additional_pad(tokenizer))
    end_of_text = cast(int, tokenizer.eos_token_id)
    return GPT2Config(vocab_size=num_rows, bos_token_id=end_of_text, eos_token_id=end_of_text)


def has_head_bias(num_classes: int, width: int) -> bool:
    """Return whether `out_head` has a bias: only where the export can fold it into the final norm (see `fold_bias`).

    A head with more classes than width has no exact solution, and a nearly square one an imprecise one.
    """
    return 2 * num_classes <= width


def count_trainable_blocks(wanted: int | Literal["all"], num_blocks: int, *, train_embeddings: bool) -> int:
    """Return how many blocks are trained of a model of `num_blocks`.

    Raises:
        ModelError: `wanted` is negative or exceeds the model's blocks; embeddings without all blocks.
    """
    num_trainable = num_blocks if wanted == "all" else wanted
    if not 0 <= num_trainable <= num_blocks:
        raise ModelError(
            f"model.trainable_blocks {num_trainable}: the model has {num_blocks} blocks. "
            f"Set --model.trainable_blocks between 0 and {num_blocks}, or to all."
        )
    if train_embeddings and num_trainable < num_blocks:
        raise ModelError(
            f"model.train_embeddings true with model.trainable_blocks {num_trainable}: the model has {num_blocks} blocks. "
            "Set --model.trainable_blocks all."
        )
    return num_trainable


def split_model(
    backbone: Backbone,
    *,
    trainable_blocks: int | Literal["all"],
    num_classes: int,
    seed: int,
    class_names: Sequence[str] | None = None,
    dropout: float | None = None,
    pooling: Pooling = "last",
    train_embeddings: bool = False,
) -> Classifier:
    """Freeze all but the last `trainable_blocks` blocks, the final norm and `out_head`; with `train_embeddings` nothing.

    `out_head` is drawn from `seed`, unless the checkpoint has a head of the same shape and pooling for the same classes
    (`class_names`; LABEL_k and None fit any). Both halves are in eval mode until `suffix.train()`. The classifier takes the
    backbone's modules, so another split needs another backbone. `dropout`: rate of all dropouts of the suffix; None: those of
    the config, which is not changed.

    Raises:
        ModelError: see `count_trainable_blocks`.
    """
    model, config = backbone.model, backbone.model.config
    num_blocks = len(model.h)
    num_trainable = count_trainable_blocks(trainable_blocks, num_blocks, train_embeddings=train_embeddings)
    # The blocks run without a mask, and only this kernel is causal then.
    model.set_attn_implementation("sdpa")
    has_bias = has_head_bias(num_classes, config.n_embd)
    out_head = cast(nn.Linear, nn.utils.skip_init(nn.Linear, config.n_embd, num_classes, bias=has_bias))
    with torch.no_grad():
        if has_bias:
            out_head.bias.zero_()
        has_head = backbone.head_CD is not None and _is_head_of(backbone, num_classes, class_names, pooling)
        if backbone.head_CD is not None and has_head:
            out_head.weight.copy_(backbone.head_CD)
        else:
            _draw_head(out_head, config, seed)
    blocks = list(enumerate(model.h))
    boundary = num_blocks - num_trainable
    is_pooled, is_mean = num_trainable == 0, pooling == "mean"
    prefix = (
        NoPrefix()
        if train_embeddings
        else Prefix(
            model.wte,
            model.wpe,
            dict(blocks[:boundary]),
            last_token_only=is_pooled and not is_mean,
            mean_eps=model.ln_f.eps if is_pooled and is_mean else None,
        )
    )
    embeddings = Embeddings(model.wte, model.wpe, model.drop) if train_embeddings else None
    suffix = Suffix(dict(blocks[boundary:]), model.ln_f, out_head, pooling=pooling, embeddings=embeddings).float().eval()
    if dropout is not None:
        set_dropout(suffix, dropout)
    # Moving a module replaces the data of its parameters. These references keep the original data without a copy.
    frozen_state = {f"transformer.{name}": weight.detach() for name, weight in prefix.named_parameters()}
    return Classifier(prefix, suffix, config, frozen_state, not has_head)


def copy_untrained(classifier: Classifier, seed: int) -> Classifier:
    """Return a classifier with the same frozen part and a copy of the untrained suffix, its head drawn from `seed`."""
    suffix = copy.deepcopy(classifier.suffix)
    if classifier.has_drawn_head:
        with torch.no_grad():
            _draw_head(suffix.out_head, classifier.config, seed)
    return replace(classifier, suffix=suffix)


def _draw_head(out_head: nn.Linear, config: GPT2Config, seed: int) -> None:
    """Draw the weights of `out_head` on the CPU, whatever its device: so they are the same everywhere."""
    generator = torch.Generator().manual_seed(_stream_seed(seed, _HEAD_STREAM))
    drawn_CD = torch.empty(out_head.weight.shape).normal_(0.0, config.initializer_range, generator=generator)
    out_head.weight.copy_(drawn_CD)


def set_dropout(suffix: Suffix, rate: float) -> None:
    """Set the rate of every dropout of the trainable part."""
    for module in suffix.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate


def count_parameters(classifier: Classifier) -> dict[str, tuple[int, int]]:
    """Count (trainable, frozen) parameters of each part, bottom to top: embeddings, h.0-10, h.11, ln_f, out_head."""
    prefix, suffix = classifier.prefix, classifier.suffix
    below = suffix if suffix.has_embeddings else prefix
    parts: dict[str, list[nn.Module]] = {"embeddings": [below.wte, below.wpe]}
    for blocks in (prefix.h, suffix.h):
        numbers = list(blocks)
        if numbers:
            first, last = numbers[0], numbers[-1]
            parts[f"h.{first}" if first == last else f"h.{first}-{last}"] = list(blocks.values())
    parts |= {"ln_f": [suffix.ln_f], "out_head": [suffix.out_head]}
    return {part: (_count(modules, trainable=True), _count(modules, trainable=False)) for part, modules in parts.items()}


def check_max_length(max_length: int, num_positions: int) -> None:
    """Check that the model has a position embedding for every token of a text; raise ModelError if not."""
    if max_length > num_positions:
        raise ModelError(
            f"data.max_length {max_length}: the model has {num_positions} positions. "
            f"Set --data.max_length to at most {num_positions}."
        )


def explain_new_head(backbone: Backbone, class_names: Sequence[str], pooling: Pooling = "last") -> str | None:
    """Return why the checkpoint's head is not used for these classes; None: it is used, or there is none."""
    if backbone.head_fault is not None:
        return f"in its config.json, {backbone.head_fault}"
    if backbone.head_CD is None or _is_head_of(backbone, len(class_names), class_names, pooling):
        return None
    if pooling != backbone.pooling:
        return f"it was trained with model.pooling {backbone.pooling}"
    names = f" ({list_first(backbone.class_names, str)})" if backbone.class_names else ""
    return f"its {len(backbone.head_CD)} classes{names} are not those of the data"


def _is_head_of(backbone: Backbone, num_classes: int, class_names: Sequence[str] | None, pooling: Pooling) -> bool:
    """Return whether the checkpoint's head has this pooling, this shape and these classes, as far as both have names."""
    if (
        pooling != backbone.pooling
        or backbone.head_CD is None
        or backbone.head_CD.shape != (num_classes, backbone.model.config.n_embd)
    ):
        return False
    unnamed = tuple(f"LABEL_{i}" for i in range(num_classes))
    names = [tuple(each) for each in (backbone.class_names, class_names) if each is not None]
    return len({each for each in names if each != unnamed}) <= 1


def _count(modules: list[nn.Module], *, trainable: bool) -> int:
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad == trainable)


def _stream_seed(seed: int, stream: int) -> int:
    return (seed * 256 + stream) % 2**63


def _draw_weights(config: GPT2Config, seed: int) -> GPT2Model:
    """Draw a model with GPT-2's initialisation from `seed` alone."""
    with torch.random.fork_rng(devices=[]), silence_transformers():
        torch.default_generator.manual_seed(_stream_seed(seed, _BACKBONE_STREAM))
        return GPT2Model(config).float().eval()


def _has_additional_pad(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether the last token is a pad token of its own."""
    return tokenizer.pad_token != tokenizer.eos_token and tokenizer.pad_token_id == len(tokenizer) - 1


def _fit_vocabulary(model: GPT2Model, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Check that each token has an embedding row; add one, the mean of the others, for an additional pad token."""
    num_rows, num_tokens = model.wte.num_embeddings, len(tokenizer)
    if num_tokens == num_rows + 1 and _has_additional_pad(tokenizer):
        rows_VD = model.wte.weight.detach()
        model.wte = nn.Embedding.from_pretrained(torch.cat([rows_VD, rows_VD.mean(dim=0, keepdim=True)]))
        model.config.vocab_size = num_tokens
    elif num_tokens > num_rows or num_rows - num_tokens >= MAX_SPARE_ROWS:
        raise ModelError(
            f"tokenizer with {num_tokens} tokens for model {name!r} with {num_rows} embedding rows: they do not belong "
            "together. Use the tokenizer that the model was trained with."
        )
    model.config.pad_token_id = cast("int | None", tokenizer.pad_token_id)
