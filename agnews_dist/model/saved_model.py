"""Config and weights of a saved GPT-2, as its files have them. Whatever they lack or contradict is an error of the user."""

import copy
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import shorten
from typing import Any, cast

from torch import Tensor, device, nn, random
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2Model

from agnews_dist.errors import ModelError
from agnews_dist.model.modeling_gpt2_mean_pooling import GPT2MeanPoolingConfig, GPT2MeanPoolingForSequenceClassification
from agnews_dist.model.pooling import Pooling
from agnews_dist.model.pretrained import CONFIG_FILE, EMBEDDED, WEIGHT_FILES, Location, locate, reading

TRAINABLE_BLOCKS_KEY = "trainable_blocks"
"""Our key of an exported config.json: the number of trained blocks, which are the last ones."""
TRAIN_EMBEDDINGS_KEY = "train_embeddings"
"""Another one: true if the embeddings were trained too."""
_HEAD_FIELDS = ("id2label", "label2id", "num_labels", "problem_type")
"""Keys of config.json that describe a classification head."""
_FIELDS = (
    *("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function", "layer_norm_epsilon"),
    *("max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("resid_pdrop", "embd_pdrop", "attn_pdrop", "initializer_range", "tie_word_embeddings", "add_cross_attention"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "architectures", *_HEAD_FIELDS),
    *(TRAINABLE_BLOCKS_KEY, TRAIN_EMBEDDINGS_KEY),
    *("dtype", "torch_dtype"),  # for the memory estimate
)
"""Keys of config.json that are read. Others say how to run the model elsewhere; some of them would break the export."""
_LONGEST_REASON = 160
"""Characters of Hugging Face's reason in a message."""
_OTHER_WEIGHTS = (".safetensors", ".bin", ".h5", ".msgpack", ".gguf", ".onnx", ".pt", ".pth")
_HEAD_NAME = re.compile(r"(^|\.)score\.weight$")
_WRAPPED = {r"^(?:(?:_orig_mod|module)\.)+": "", r"\.(?:(?:_orig_mod|module)\.)+": "."}
"""Parts of names that torch.compile and DistributedDataParallel add, at the start and inside: pattern -> replacement."""


@dataclass(frozen=True)
class Backbone:
    """A GPT-2 on the CPU, in the type of its file, with an embedding row for every token of its tokenizer."""

    model: GPT2Model
    head_CD: Tensor | None
    class_names: tuple[str, ...] | None
    """Head and class names are None if the checkpoint is not a classifier, or one with a `head_fault`."""
    head_fault: str | None = None
    """Field of config.json, and why its head cannot be used."""
    notes: tuple[str, ...] = ()
    """Unusual things about the files, for the user."""
    pad_id: int | None = None
    """Pad token of config.json."""
    pooling: Pooling = "last"
    """The rows that its head was trained on."""


def read_config(location: Location) -> GPT2Config:
    """Read the config; without the fields of a head that cannot be used (see `_find_head_fault`)."""
    raw = _read_raw_config(location)
    unread = _HEAD_FIELDS if _find_head_fault(raw) else ()
    try:
        config = GPT2Config.from_dict({key: raw[key] for key in _FIELDS if key in raw and key not in unread})
        with device("meta"):
            GPT2Model(config)
    except Exception as error:  # a value of another type, a width the heads do not divide, an unknown activation
        reason = shorten(str(error), _LONGEST_REASON)
        raise ModelError(
            f"{CONFIG_FILE} of model {location.name!r}: it describes no possible model ({reason}). Correct {CONFIG_FILE}."
        ) from error
    if config.add_cross_attention:
        raise ModelError(
            f"model {location.name!r} has add_cross_attention: a classifier has no second sequence. "
            "Choose a GPT-2 without cross-attention."
        )
    return config


def _read_raw_config(location: Location) -> dict[str, Any]:
    if (location.directory / "adapter_config.json").is_file():
        raise ModelError(
            f"model directory {location.directory}: it is a PEFT adapter (adapter_config.json). Merge it into its model with "
            "merge_and_unload, and save that."
        )
    if not location.has_any(CONFIG_FILE):
        raise ModelError(
            f"model directory {location.directory}: it has no {CONFIG_FILE}. Copy the whole model directory, "
            "or set --model.name to one that Hugging Face's save_pretrained wrote."
        )
    with reading(location, CONFIG_FILE):
        raw = GPT2Config.get_config_dict(str(location.directory))[0]
        if raw.get("model_type") not in ("gpt2", GPT2MeanPoolingConfig.model_type):
            raise ModelError(
                f"model {location.name!r} is a {raw.get('model_type')!r} model: only GPT-2 is supported. "
                "Choose a GPT-2 of any size, such as gpt2, gpt2-medium or distilgpt2."
            )
    if raw.get("quantization_config"):
        raise ModelError(
            f"{CONFIG_FILE} of model {location.name!r}: it has a quantization_config, and quantised weights cannot be read. "
            "Choose the model in full precision."
        )
    return raw


def check_config(name: str, revision: str | None, *, is_classifier: bool) -> None:
    """Check config.json, if there is one, before transformers reads it for the tokenizer.

    `is_classifier`: it must describe one class per text. Training replaces such a head, if transformers can read it.

    Raises:
        ModelError: it names the wrong field.
    """
    location = None if name == EMBEDDED else locate(name, revision)
    if location is None or not (is_classifier or location.has_any(CONFIG_FILE)):
        return
    raw = _read_raw_config(location)
    fault = _find_head_fault(raw)
    if fault is None or not is_classifier:
        try:
            GPT2Config.from_dict(raw)
            return
        except Exception as error:  # Hugging Face checks values by many kinds of errors
            fault = fault or shorten(str(error), _LONGEST_REASON)
    raise ModelError(f"{CONFIG_FILE} of model {name!r}: {fault}. Correct {CONFIG_FILE}, or choose another model.")


def _find_head_fault(raw: Mapping[str, Any]) -> str | None:
    """Return the field of a config.json that does not describe a classifier of one class per text, and why; else None."""
    problem, names = raw.get("problem_type"), raw.get("id2label")
    if problem not in (None, "single_label_classification"):
        return f"problem_type is {problem!r}: it must be 'single_label_classification' or null"
    if names is None:
        return None
    if not isinstance(names, dict) or not names:
        return f"id2label is {names!r}: it must map 0, 1, ... to names"
    labels = cast("dict[Any, Any]", names)
    if {str(key) for key in labels} != {str(i) for i in range(len(labels))}:
        return f"id2label has the keys {', '.join(map(str, labels))[:60]}: they must be 0 to {len(labels) - 1}"
    if wrong := [name for name in labels.values() if not isinstance(name, str)]:
        return f"id2label has the name {wrong[0]!r}: names must be texts, in quotes"
    if twice := [name for name, times in Counter(labels.values()).items() if times > 1]:
        return f"id2label names more than one class {twice[0]!r}: names must differ"
    if (num_labels := raw.get("num_labels")) not in (None, len(labels)):
        return f"num_labels is {num_labels!r}: id2label has {len(labels)} names"
    return None


def read_weights(location: Location, config: GPT2Config) -> Backbone:
    """Read the model in the type of its file, and the head and class names if it is a classifier."""
    if not location.has_any(*WEIGHT_FILES):
        others = sorted(path.name for path in location.directory.iterdir() if path.suffix in _OTHER_WEIGHTS)
        found = f", only {others[0]}, which is not read" if others else ""
        raise ModelError(
            f"model directory {location.directory}: it has no weights (none of {', '.join(WEIGHT_FILES)}){found}. "
            "Copy the whole model directory, or set --model.init random."
        )
    architectures = config.architectures or []
    # Both classes have the same weights.
    is_mean = GPT2MeanPoolingForSequenceClassification.__name__ in architectures
    has_head = is_mean or GPT2ForSequenceClassification.__name__ in architectures
    raw = _read_raw_config(location) if has_head else {}

    config = copy.deepcopy(config)
    config.dtype = None  # "auto" would prefer it to the type of the file, and round the weights

    def load(renamed: dict[str, str] | None) -> tuple[nn.Module, dict[str, Any]]:
        architecture = GPT2ForSequenceClassification if has_head and _find_head_fault(raw) is None else GPT2Model
        with reading(location, "weights"), random.fork_rng(devices=[]):
            loaded = architecture.from_pretrained(
                str(location.directory),
                config=config,
                dtype="auto",  # that of the file: its mapped pages, not a copy
                attn_implementation="sdpa",
                ignore_mismatched_sizes=True,  # the report lists them
                output_loading_info=True,
                key_mapping=renamed,
            )
            return cast("tuple[nn.Module, dict[str, Any]]", loaded)

    loaded, report = load(None)
    if not has_head and any(_HEAD_NAME.search(name) for name in report["unexpected_keys"]):
        has_head, raw = True, _read_raw_config(location)
        loaded, report = load(None)
    renamed = _find_new_names(report, is_tied=bool(config.tie_word_embeddings)) if report["missing_keys"] else {}
    if renamed:
        loaded, report = load(renamed)
    _check_loaded(loaded, report, location)
    notes: tuple[str, ...] = ()
    if renamed.keys() & _WRAPPED.keys():
        notes = (f"weights of model {location.name!r}: _orig_mod. and module. are removed from their names.",)
    if not isinstance(loaded, GPT2ForSequenceClassification):
        return Backbone(cast(GPT2Model, loaded), None, None, _find_head_fault(raw), notes)
    names = cast(dict[int, str], config.id2label)
    class_names = tuple(names[i] for i in range(len(names)))
    numbers = raw["label2id"] if isinstance(raw.get("label2id"), dict) else {}
    if any(name in class_names and type(i) is int and names.get(i) != name for name, i in numbers.items()):
        notes += (f"{CONFIG_FILE} of model {location.name!r}: label2id contradicts id2label, which is used.",)
    head_CD = loaded.score.weight.detach()
    return Backbone(loaded.transformer, head_CD, class_names, notes=notes, pooling="mean" if is_mean else "last")


def _find_new_names(report: dict[str, Any], *, is_tied: bool) -> dict[str, str]:
    """Return how names of a file become those of the missing weights, as regular expressions; empty if they cannot."""
    unexpected: set[str] = set(report["unexpected_keys"])
    plain = unexpected
    for pattern, replacement in _WRAPPED.items():
        plain = {re.sub(pattern, replacement, name) for name in plain}
    renamed = dict(_WRAPPED) if plain != unexpected else {}
    # Tied weights may be stored once, as those of the language model's head.
    if is_tied and "lm_head.weight" in plain and not any(name.endswith("wte.weight") for name in plain):
        renamed[r"^lm_head\.weight$"] = "transformer.wte.weight"
    return renamed


def _check_loaded(loaded: nn.Module, report: dict[str, Any], location: Location) -> None:
    """Check that every weight was read and is finite: Hugging Face replaces missing or misshapen ones by random numbers."""
    misshapen: dict[str, tuple[int, ...]] = {name: tuple(found) for name, found, _ in report["mismatched_keys"]}
    if (shape := misshapen.get("score.weight")) and len(shape) == 2:
        raise ModelError(
            f"{CONFIG_FILE} of model {location.name!r}: id2label has {cast(Any, loaded).config.num_labels} names, the head "
            f"score.weight {shape[0]} rows and {shape[1]} columns. Correct id2label, or copy the whole model directory again."
        )
    surplus = [key for key in report["unexpected_keys"] if re.search(r"(^|\.)h\.\d+\.(?!attn\.(masked_)?bias$)", key)]
    for keys, fault in (
        (report["missing_keys"], "are missing"),
        (list(misshapen), f"have another shape than in {CONFIG_FILE}"),
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
