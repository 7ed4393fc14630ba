"""GPT-2 from a name to a classifier: load or draw the weights, add a row for [PAD], split at the freeze boundary."""

import copy
import re
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2Model, PreTrainedTokenizerFast

from agnews_dist.data.hugging_face import silence_transformers
from agnews_dist.errors import ModelError
from agnews_dist.model.embedded import EMBEDDED_SEED, embedded_config, scale_embeddings
from agnews_dist.model.prefix import Prefix
from agnews_dist.model.pretrained import CONFIG_FILE, EMBEDDED, TOKENIZER_FILES, WEIGHT_FILES, Location, locate, reading
from agnews_dist.model.suffix import Suffix

MAX_SPARE_ROWS = 1024
"""Limit of embedding rows beyond the tokenizer's tokens; checkpoints may be padded to a multiple of up to 1024."""
_BACKBONE_STREAM, _HEAD_STREAM = 0, 1
"""Numbers of the random streams that one seed gives to different parts of the model."""


@dataclass(frozen=True)
class Backbone:
    """A GPT-2 on the CPU, in the type of its file, with an embedding row for every token of its tokenizer."""

    model: GPT2Model
    head_CD: Tensor | None
    class_names: tuple[str, ...] | None
    """Head and class names are None if the checkpoint is not a classifier."""


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
        ModelError: hub unreachable; no such directory; no config or weights, or damaged, incomplete or non-finite
            ones; not GPT-2; a vocabulary that does not fit the tokenizer.
    """
    head_CD, class_names = None, None
    config = copy.deepcopy(config) or load_model_config(name, revision=revision, init=init, tokenizer=tokenizer)
    if name == EMBEDDED:
        model = _draw_weights(config, EMBEDDED_SEED if init == "pretrained" else seed, name)
        scale_embeddings(model)
    elif init == "random":
        model = _draw_weights(config, seed, name)
    else:
        model, head_CD, class_names = _read_weights(locate(name, revision), config)
    _fit_vocabulary(model, tokenizer, name)
    return Backbone(model, head_CD, class_names)


def load_model_config(
    name: str, *, revision: str | None, init: Literal["pretrained", "random"], tokenizer: PreTrainedTokenizerFast
) -> GPT2Config:
    """Load the config of the model that `load_backbone` would load; arguments as there.

    Raises:
        ModelError: hub unreachable; no such directory; no config, or not GPT-2's.
    """
    if name == EMBEDDED:
        return embedded_config()
    location = locate(name, revision)
    has_only_tokenizer = not location.has_any(CONFIG_FILE) and location.has_any(*TOKENIZER_FILES)
    if not has_only_tokenizer or init != "random":
        return _read_config(location)
    # GPT-2 small, without the row of [PAD] that `_fit_vocabulary` adds: so both pad tokens give the same drawn weights.
    num_rows = len(tokenizer) - int(_has_additional_pad(tokenizer))
    end_of_text = cast(int, tokenizer.eos_token_id)
    return GPT2Config(vocab_size=num_rows, bos_token_id=end_of_text, eos_token_id=end_of_text)


def split_model(backbone: Backbone, *, trainable_blocks: int | Literal["all"], num_classes: int, seed: int) -> Classifier:
    """Freeze all but the last `trainable_blocks` blocks, the final norm and `out_head`.

    `out_head` is drawn from `seed`, unless the checkpoint has a head of the same shape. Both halves are in eval mode until
    `suffix.train()`. The classifier takes the backbone's modules, so another split needs another backbone.

    Raises:
        ModelError: `trainable_blocks` is negative or exceeds the model's blocks.
    """
    model, config = backbone.model, backbone.model.config
    num_blocks = len(model.h)
    num_trainable = num_blocks if trainable_blocks == "all" else trainable_blocks
    if not 0 <= num_trainable <= num_blocks:
        raise ModelError(
            f"model.trainable_blocks {num_trainable}: the model has {num_blocks} blocks. "
            f"Set --model.trainable_blocks between 0 and {num_blocks}, or to all."
        )
    # The blocks run without a mask, and only this kernel is causal then.
    model.set_attn_implementation("sdpa")
    out_head = cast(nn.Linear, nn.utils.skip_init(nn.Linear, config.n_embd, num_classes))
    with torch.no_grad():
        out_head.bias.zero_()
        if backbone.head_CD is not None and backbone.head_CD.shape == out_head.weight.shape:
            out_head.weight.copy_(backbone.head_CD)
        else:
            generator = torch.Generator().manual_seed(_stream_seed(seed, _HEAD_STREAM))
            out_head.weight.normal_(0.0, config.initializer_range, generator=generator)
    blocks = list(enumerate(model.h))
    boundary = num_blocks - num_trainable
    prefix = Prefix(model.wte, model.wpe, dict(blocks[:boundary]), last_token_only=num_trainable == 0)
    suffix = Suffix(dict(blocks[boundary:]), model.ln_f, out_head).float().eval()
    # Moving a module replaces the data of its parameters. These references keep the original data without a copy.
    frozen_state = {f"transformer.{name}": weight.detach() for name, weight in prefix.named_parameters()}
    return Classifier(prefix, suffix, config, frozen_state)


def count_parameters(classifier: Classifier) -> dict[str, tuple[int, int]]:
    """Count (trainable, frozen) parameters of each part, bottom to top: embeddings, h.0-10, h.11, ln_f, out_head."""
    prefix, suffix = classifier.prefix, classifier.suffix
    parts: dict[str, list[nn.Module]] = {"embeddings": [prefix.wte, prefix.wpe]}
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


def _count(modules: list[nn.Module], *, trainable: bool) -> int:
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad == trainable)


def _stream_seed(seed: int, stream: int) -> int:
    return (seed * 256 + stream) % 2**63


def _draw_weights(config: GPT2Config, seed: int, name: str) -> GPT2Model:
    """Draw a model with GPT-2's initialisation from `seed` alone."""
    with torch.random.fork_rng(devices=[]), silence_transformers():
        torch.default_generator.manual_seed(_stream_seed(seed, _BACKBONE_STREAM))
        try:
            return GPT2Model(config).float().eval()
        except (ValueError, KeyError) as error:  # a width the heads do not divide, an unknown activation
            raise ModelError(
                f"{CONFIG_FILE} of model {name!r}: it describes no possible model ({error}). Correct {CONFIG_FILE}."
            ) from error


def _read_config(location: Location) -> GPT2Config:
    if not location.has_any(CONFIG_FILE):
        raise ModelError(
            f"model directory {location.directory}: it has no {CONFIG_FILE}. Copy the whole model directory, "
            "or set --model.name to one that Hugging Face's save_pretrained wrote."
        )
    with reading(location, CONFIG_FILE):
        raw = GPT2Config.get_config_dict(location.target, revision=location.revision)[0]
        if raw.get("model_type") != "gpt2":
            raise ModelError(
                f"model {location.name!r} is a {raw.get('model_type')!r} model: only GPT-2 is supported. "
                "Choose a GPT-2 of any size, such as gpt2, gpt2-medium or distilgpt2."
            )
        config = GPT2Config.from_dict(raw)
    if config.add_cross_attention:
        raise ModelError(
            f"model {location.name!r} has add_cross_attention: a classifier has no second sequence. "
            "Choose a GPT-2 without cross-attention."
        )
    return config


def _read_weights(location: Location, config: GPT2Config) -> tuple[GPT2Model, Tensor | None, tuple[str, ...] | None]:
    """Read the model in the type of its file, and the head and class names if it is a classifier."""
    if not location.has_any(*WEIGHT_FILES):
        raise ModelError(
            f"model directory {location.directory}: it has no weights (none of {', '.join(WEIGHT_FILES)}). "
            "Copy the whole model directory, or set --model.init random."
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
                dtype="auto",  # the type of the file: its mapped pages, not a copy
                attn_implementation="sdpa",
                ignore_mismatched_sizes=True,  # the report lists them
                output_loading_info=True,
            ),
        )
    _check_loaded(loaded, report, location)
    if not isinstance(loaded, GPT2ForSequenceClassification):
        return cast(GPT2Model, loaded), None, None
    names = cast(dict[int, str], config.id2label)
    return loaded.transformer, loaded.score.weight.detach(), tuple(names[i] for i in range(len(names)))


def _check_loaded(loaded: nn.Module, report: dict[str, Any], location: Location) -> None:
    """Check that every weight was read and is finite: Hugging Face replaces missing or misshapen ones by random numbers."""
    surplus = [key for key in report["unexpected_keys"] if re.search(r"(^|\.)h\.\d+\.(?!attn\.(masked_)?bias$)", key)]
    for keys, fault in (
        (report["missing_keys"], "are missing"),
        ([key[0] for key in report["mismatched_keys"]], f"have another shape than in {CONFIG_FILE}"),
        (surplus, f"belong to blocks beyond those of {CONFIG_FILE}"),
    ):
        if keys:
            raise ModelError(
                f"weights of model {location.name!r}: {len(keys)} {fault}, such as {min(keys)}. "
                f"Copy the whole model directory again, {CONFIG_FILE} and weights together."
            )
    for name, weight in loaded.named_parameters():
        if not bool(weight.isfinite().all()):
            raise ModelError(
                f"weight {name} of model {location.name!r} contains NaN or infinity: every logit would be NaN. "
                "Use a checkpoint from before its training diverged."
            )


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
