"""From a name to a classifier: load or draw GPT-2, grow it by [PAD], freeze it, split it at the freeze boundary.

`load_backbone` and `split` are called by the stories that train; export.py goes the way back.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2Model, PreTrainedTokenizerFast

from agnews_dist.errors import ModelError
from agnews_dist.model.embedded import EMBEDDED_SEED, embedded_config, spread_embeddings
from agnews_dist.model.prefix import Prefix
from agnews_dist.model.pretrained import EMBEDDED, TOKENIZER_FILES, Location, locate, quietly, reading
from agnews_dist.model.suffix import Suffix

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
MAX_SPARE_ROWS = 1024
"""Embedding rows a model may have beyond its tokenizer: some are padded to a multiple of up to 1024 for speed."""
_BACKBONE_STREAM, _HEAD_STREAM = 0, 1
"""Weights drawn from one seed for different parts must not be the same numbers."""


@dataclass(frozen=True)
class Backbone:
    """A GPT-2 on the CPU, as it is stored, whose embedding has a row for every token of its tokenizer."""

    model: GPT2Model
    head_CD: Tensor | None
    """The head of a checkpoint that already is a classifier."""
    class_names: tuple[str, ...] | None
    """That classifier's class names."""


@dataclass(frozen=True)
class Classifier:
    """The two halves, and what the export needs of the frozen one."""

    prefix: Prefix
    suffix: Suffix
    config: GPT2Config
    frozen_state: dict[str, Tensor]
    """Hugging Face's name -> the frozen weights on the CPU as stored, whatever becomes of the prefix's copies. Of a safetensors
    file these are its mapped pages, which the ranks of a node share."""

    def logits(self, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Right-padded tokens_BT with lengths_B (>= 1) to logits_BC."""
        return cast(Tensor, self.suffix(*self.prefix.features(tokens_BT, lengths_B)))

    def use_fast_path(self, fast_path: bool) -> None:
        """False: Hugging Face's own forward in both halves, the reference. Set it before any features are made."""
        self.prefix.fast_path = fast_path
        self.suffix.use_fast_path(fast_path)


def load_backbone(
    name: str,
    *,
    revision: str | None,
    init: Literal["pretrained", "random"],
    seed: int,
    tokenizer: PreTrainedTokenizerFast,
) -> Backbone:
    """GPT-2 from a hub id, a directory or 'embedded'.

    With `init` 'random' only its shape is read and the weights are drawn from `seed`. The global random state
    is neither used nor moved.

    Raises:
        ModelError: hub out of reach; no such directory; no config or weights, or damaged, incomplete or non-finite
            ones; not GPT-2; a vocabulary that does not fit the tokenizer.
    """
    head_CD, class_names = None, None
    shape = load_shape(name, revision=revision, init=init, tokenizer=tokenizer)
    if name == EMBEDDED:
        model = _draw(shape, EMBEDDED_SEED if init == "pretrained" else seed, name)
        spread_embeddings(model)
    elif init == "random":
        model = _draw(shape, seed, name)
    else:
        model, head_CD, class_names = _read_weights(locate(name, revision), shape)
    _fit_vocabulary(model, tokenizer, name)
    return Backbone(model, head_CD, class_names)


def load_shape(
    name: str, *, revision: str | None, init: Literal["pretrained", "random"], tokenizer: PreTrainedTokenizerFast
) -> GPT2Config:
    """The config of the model that `load_backbone` would give, without its weights.

    Raises:
        ModelError: hub out of reach; no such directory; no config, or not GPT-2's.
    """
    if name == EMBEDDED:
        return embedded_config()
    location = locate(name, revision)
    return _read_shape(location, tokenizer) if init == "random" else _read_config(location)


def split(backbone: Backbone, *, trainable_blocks: int | Literal["all"], num_classes: int, seed: int) -> Classifier:
    """Freeze all but the last `trainable_blocks` blocks, the final norm and `out_head`, which is drawn from `seed`.

    A checkpoint's own head of the right shape is kept. Both halves are in eval mode until `suffix.train()`. The classifier
    takes the backbone's modules over; load another backbone for another split.

    Raises:
        ModelError: more trainable blocks than the model has, or fewer than none.
    """
    model, config = backbone.model, backbone.model.config
    num_blocks = len(model.h)
    num_trainable = num_blocks if trainable_blocks == "all" else trainable_blocks
    if not 0 <= num_trainable <= num_blocks:
        raise ModelError(
            f"model.trainable_blocks {num_trainable}, but the model has {num_blocks} blocks: there is nothing more to "
            f"train. Set --model.trainable_blocks between 0 and {num_blocks}, or to all."
        )
    # The blocks run without a mask: only this kernel is then causal.
    model.set_attn_implementation("sdpa")
    out_head = cast(nn.Linear, nn.utils.skip_init(nn.Linear, config.n_embd, num_classes))
    with torch.no_grad():
        out_head.bias.zero_()
        if backbone.head_CD is not None and backbone.head_CD.shape == out_head.weight.shape:
            out_head.weight.copy_(backbone.head_CD)
        else:
            generator = torch.Generator().manual_seed(_stream_seed(seed, _HEAD_STREAM))
            out_head.weight.normal_(0.0, config.initializer_range, generator=generator)
    blocks = dict(enumerate(model.h))
    boundary = num_blocks - num_trainable
    prefix = Prefix(
        model.wte,
        model.wpe,
        {i: block for i, block in blocks.items() if i < boundary},
        last_token_only=num_trainable == 0,
    )
    suffix = Suffix({i: block for i, block in blocks.items() if i >= boundary}, model.ln_f, out_head).float().eval()
    # Moving a module replaces its parameters' data; these references keep the originals without a copy.
    frozen_state = {f"transformer.{name}": weight.detach() for name, weight in prefix.named_parameters()}
    return Classifier(prefix, suffix, config, frozen_state)


def parameter_table(classifier: Classifier) -> dict[str, tuple[int, int]]:
    """Part of the model -> (trainable, frozen) parameters, bottom to top: embeddings, h.0-10, h.11, ln_f, out_head."""
    prefix, suffix = classifier.prefix, classifier.suffix
    parts: dict[str, list[nn.Module]] = {"embeddings": [prefix.wte, prefix.wpe]}
    for blocks in (prefix.h, suffix.h):
        numbers = list(blocks.keys())
        if numbers:
            first, last = numbers[0], numbers[-1]
            parts[f"h.{first}" if first == last else f"h.{first}-{last}"] = list(blocks.values())
    parts |= {"ln_f": [suffix.ln_f], "out_head": [suffix.out_head]}
    return {
        part: (_count(modules, trainable=True), _count(modules, trainable=False)) for part, modules in parts.items()
    }


def check_max_length(max_length: int, num_positions: int) -> None:
    """Refuse texts longer than the model's position embeddings.

    Raises:
        ModelError: `max_length` is above `num_positions`.
    """
    if max_length > num_positions:
        raise ModelError(
            f"data.max_length {max_length} is above the model's {num_positions} positions: later tokens would have no "
            f"position embedding. Set --data.max_length to at most {num_positions}."
        )


def _count(modules: list[nn.Module], *, trainable: bool) -> int:
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad == trainable)


def _stream_seed(seed: int, stream: int) -> int:
    return (seed * 256 + stream) % 2**63


def _draw(config: GPT2Config, seed: int, name: str) -> GPT2Model:
    """A model with GPT-2's initialisation from `seed` alone."""
    with torch.random.fork_rng(devices=[]), quietly():
        torch.default_generator.manual_seed(_stream_seed(seed, _BACKBONE_STREAM))
        try:
            model = GPT2Model(config).float().eval()
        except (ValueError, KeyError) as error:  # a width the heads do not divide, an unknown activation
            raise ModelError(
                f"config of model {name!r} describes no possible model ({error}): nothing can be built from it. "
                "Correct config.json."
            ) from error
    return model


def _read_config(location: Location) -> GPT2Config:
    if not location.has("config.json"):
        raise ModelError(
            f"{location.directory} has no config.json: the model's shape is unknown. Copy the whole model directory, "
            "or set --model.name to one that Hugging Face's save_pretrained wrote."
        )
    with reading(location, "config.json"):
        raw = GPT2Config.get_config_dict(location.target, revision=location.revision)[0]
    if raw.get("model_type") != "gpt2":
        raise ModelError(
            f"model {location.name!r} is a {raw.get('model_type')!r} model: only GPT-2 can be split at the freeze "
            "boundary. Choose a GPT-2 of any size, such as gpt2, gpt2-medium or distilgpt2."
        )
    with reading(location, "config.json"):
        config = GPT2Config.from_dict(raw)
    if config.add_cross_attention:
        raise ModelError(
            f"model {location.name!r} has add_cross_attention: it reads a second sequence that a classifier does not "
            "have. Choose a GPT-2 without cross-attention."
        )
    return config


def _read_shape(location: Location, tokenizer: PreTrainedTokenizerFast) -> GPT2Config:
    """The config alone; GPT-2 small's shape for a directory that holds only a tokenizer."""
    if location.has("config.json") or not location.has(*TOKENIZER_FILES):
        return _read_config(location)
    # Without the pad row, which `_fit_vocabulary` adds: the other weights are the same for both pad options.
    num_rows = len(tokenizer) - int(_pad_is_last_and_extra(tokenizer))
    end_of_text = cast(int, tokenizer.eos_token_id)
    return GPT2Config(vocab_size=num_rows, bos_token_id=end_of_text, eos_token_id=end_of_text)


def _read_weights(location: Location, config: GPT2Config) -> tuple[GPT2Model, Tensor | None, tuple[str, ...] | None]:
    """The pretrained model in fp32, and the head and class names where the checkpoint is a classifier."""
    if not location.has(*WEIGHT_FILES):
        raise ModelError(
            f"{location.directory} has no weights (none of {', '.join(WEIGHT_FILES[:3])}): only random ones would be "
            "left. Copy the whole model directory, or set --model.init random to start from nothing."
        )
    is_classifier = GPT2ForSequenceClassification.__name__ in (config.architectures or [])
    architecture = GPT2ForSequenceClassification if is_classifier else GPT2Model
    with reading(location, "weights"), torch.random.fork_rng(devices=[]):
        loaded, report = cast(
            "tuple[nn.Module, dict[str, Any]]",
            architecture.from_pretrained(
                location.target,
                config=config,
                revision=location.revision or "main",
                dtype="auto",  # as stored: pages of the file, no copy; converted is what computes, where it computes
                attn_implementation="sdpa",
                ignore_mismatched_sizes=True,  # so that the report names them
                output_loading_info=True,
            ),
        )
    _check_loaded(loaded, report, location)
    if not isinstance(loaded, GPT2ForSequenceClassification):
        return cast(GPT2Model, loaded), None, None
    names = cast(dict[int, str], config.id2label)
    class_names = tuple(names[i] for i in range(len(names)))
    return loaded.transformer, loaded.score.weight.detach(), class_names


def _check_loaded(loaded: nn.Module, report: dict[str, Any], location: Location) -> None:
    """Hugging Face fills what is missing or misshapen with random numbers and goes on; we do not."""
    surplus = [key for key in report["unexpected_keys"] if re.search(r"(^|\.)h\.\d+\.(?!attn\.(masked_)?bias$)", key)]
    for keys, what in (
        (report["missing_keys"], "lack"),
        ([key[0] for key in report["mismatched_keys"]], "have another shape than config.json says for"),
        (surplus, "have blocks that config.json does not know:"),
    ):
        if keys:
            raise ModelError(
                f"the weights of model {location.name!r} {what} {min(keys)} ({len(keys)} such): parts of the model "
                "would be random or left out. Copy the whole model directory again, config.json and weights together."
            )
    for name, weight in loaded.named_parameters():
        if not bool(weight.isfinite().all()):
            raise ModelError(
                f"weight {name} of model {location.name!r} holds NaN or infinity: every logit would be NaN. "
                "Use a checkpoint saved before its training diverged."
            )


def _pad_is_last_and_extra(tokenizer: PreTrainedTokenizerFast) -> bool:
    return tokenizer.pad_token != tokenizer.eos_token and tokenizer.pad_token_id == len(tokenizer) - 1


def _fit_vocabulary(model: GPT2Model, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Grow the embedding by the pad token's row, the mean of the others, where the tokenizer has one token more."""
    num_rows, num_tokens = model.wte.num_embeddings, len(tokenizer)
    if num_tokens == num_rows + 1 and _pad_is_last_and_extra(tokenizer):
        rows_VD = model.wte.weight.detach()
        model.wte = nn.Embedding.from_pretrained(torch.cat([rows_VD, rows_VD.mean(dim=0, keepdim=True)]))
        model.config.vocab_size = num_tokens
    elif num_tokens > num_rows or num_rows - num_tokens >= MAX_SPARE_ROWS:
        raise ModelError(
            f"the tokenizer has {num_tokens} tokens but model {name!r} has {num_rows} embedding rows: they do not "
            "belong together, ids would mean other words. Use the tokenizer that the model was trained with."
        )
    model.config.pad_token_id = cast("int | None", tokenizer.pad_token_id)
