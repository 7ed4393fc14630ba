"""Export to a directory that Hugging Face loads as a classifier, and loading of such a directory.

Hugging Face's head has no bias. Ours, where it has one (see `has_head_bias`), is folded into the final norm's bias: with the
head's weight W and bias c and the norm's bias b, `W (b + b') = W b + c` for the minimum-norm solution b' of `W b' = c`,
computed in fp64.
"""

import copy
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2Model, PreTrainedTokenizerFast

from agnews_dist.data.hugging_face import silence_transformers
from agnews_dist.data.tokens import TRAINING_ENCODING, TextEncoding
from agnews_dist.errors import ModelError
from agnews_dist.model import modeling_gpt2_mean_pooling
from agnews_dist.model.gpt2 import Classifier, check_max_length, load_backbone, split_model
from agnews_dist.model.modeling_gpt2_mean_pooling import GPT2MeanPoolingConfig, GPT2MeanPoolingForSequenceClassification
from agnews_dist.model.pretrained import can_produce, find_model_directory, read_tokenizer
from agnews_dist.model.saved_model import TRAIN_EMBEDDINGS_KEY, TRAINABLE_BLOCKS_KEY, check_config
from agnews_dist.model.suffix import Standard
from agnews_dist.model.tokenizer_files import write_tokenizer
from agnews_dist.storage import atomic
from agnews_dist.storage.capacity import gigabytes

EXPORT_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")
"""Files of an export."""
MODELING_FILE = f"{modeling_gpt2_mean_pooling.__name__.rpartition('.')[2]}.py"
"""Another one, the code of a model with mean pooling."""
_NUM_INODES = 64
"""Files and directories of a run: its own, those of a few checkpoints, and the export while an older one is there."""
FOLDING_TOLERANCE = 1e-5
"""Limit of a logit's error by folding, relative to max(1, the largest bias)."""

SMALLEST_SINGULAR = 1e-6
"""Singular values of the head, relative to the largest, that fp32 does not resolve: a solved head has one of them."""


def fold_bias(weight_CD: Tensor, bias_C: Tensor, norm_bias_D: Tensor) -> Tensor:
    """Fold the head's bias into the final norm's bias, which is returned in fp32; the probabilities stay the same.

    The logits stay the same too, unless the rank of W is too low (for example, more classes than width). Then they lose
    mean(c), which changes no probability.

    Raises:
        ModelError: not even c - mean(c) is in the range of W.
    """
    weight, bias, norm_bias = (t.detach().cpu().double() for t in (weight_CD, bias_C, norm_bias_D))
    tolerance = FOLDING_TOLERANCE * max(1.0, bias.abs().max().item())
    residual = float("inf")
    for target_C in (bias, bias - bias.mean()):
        shift_D = torch.linalg.lstsq(weight, target_C[:, None], rcond=SMALLEST_SINGULAR, driver="gelsd").solution[:, 0]
        folded_D = (norm_bias + shift_D).float()
        # Includes the rounding to fp32, which a nearly singular W amplifies.
        residual = (weight @ (folded_D.double() - norm_bias) - target_C).abs().max().item()
        if residual <= tolerance:
            return folded_D
    raise ModelError(
        f"out_head's bias does not fold into the final norm: residual {residual:.2g} with {len(bias)} classes and width "
        f"{weight.shape[1]}. Use a model wider than its number of classes, or another --run.seed."
    )


def fold_standard(weight_CD: Tensor, bias_C: Tensor | None, standard: Standard) -> tuple[Tensor, Tensor | None]:
    """Fold the standardisation of the head's inputs into its weight and bias, on the CPU: W/s in fp32, c - W/s m in fp64.

    A head without a bias has inputs that are scaled and not centred.
    """
    mean_D, deviation_D = (each.cpu().double() for each in standard)
    folded_CD = (weight_CD.double() / deviation_D).float()
    # From the rounded weight: its rounding errors then cancel at the mean, which may be large.
    return folded_CD, None if bias_C is None else bias_C.double() - folded_CD.double() @ mean_D


def export_model(
    directory: Path,
    classifier: Classifier,
    tokenizer: PreTrainedTokenizerFast,
    *,
    trained: Mapping[str, Tensor] | None = None,
    class_names: Sequence[str],
    max_length: int,
    card: str,
) -> None:
    """Export for `AutoModelForSequenceClassification` and `pipeline("text-classification")`.

    The weights are fp32, and frozen ones equal their source bit for bit. The directory appears whole or not at all, and
    replaces an existing one. `trained` are the suffix's weights by name; None takes them from the classifier, which must not be
    sharded. `card` is the content of README.md.

    Raises:
        ModelError: the head's bias does not fold, or the directory cannot be written.
    """
    state = _huggingface_state(classifier, trained or dict(classifier.suffix.named_parameters()))
    atomic.sweep(directory.parent, re.escape(directory.name))
    try:
        with atomic.new_directory(directory) as staging:
            _write_model(staging, classifier, state, cast("int | None", tokenizer.pad_token_id), class_names)
            write_tokenizer(staging, tokenizer, max_length)
            (staging / "README.md").write_text(card, encoding="utf-8")
            # safetensors makes its files private to the user; here they get the mode that the umask gives to other files.
            mode = (staging / "README.md").stat().st_mode
            for path in staging.iterdir():
                path.chmod(mode)
    except Exception as error:
        # A full disk is a SafetensorError for safetensors, and a plain Exception for tokenizers.
        if not isinstance(error, (OSError, SafetensorError)) and type(error) is not Exception:
            raise
        raise ModelError(
            f"the model cannot be written to {directory}: {getattr(error, 'strerror', None) or error}. "
            "Free some space, or choose a writable --run.dir."
        ) from error


def run_bytes(
    num_trained: int, num_frozen: int, num_checkpoints: int, *, has_average: bool = False, other_bytes: int = 0
) -> int:
    """Return what a run writes: the model, and checkpoints of the trained weights, two moments for each, and the best weights.

    `num_checkpoints`: those on disk at the same time that are still to be written. `has_average`: a checkpoint also holds the
    average of each weight. `other_bytes`: its other files.
    """
    return 4 * (num_trained + num_frozen) + (20 if has_average else 16) * num_trained * num_checkpoints + other_bytes


def check_room(directory: Path, needed: int) -> None:
    """Check before training that a run can write `needed` bytes below `directory`, as far as that is known.

    Raises:
        ModelError: too little space, no free inode, or a path that is not UTF-8, which safetensors cannot write.
    """
    try:
        str(directory.absolute()).encode()
    except UnicodeEncodeError as error:
        raise ModelError(f"run.dir {str(directory)!r}: its path is not UTF-8. Set --run.dir to another one.") from error
    system = os.statvfs(next(path for path in (directory.absolute(), *directory.absolute().parents) if path.is_dir()))
    if (free := system.f_bavail * system.f_frsize) < needed:
        raise ModelError(
            f"run.dir {directory}: {gigabytes(free)} free, the model and the checkpoints take {gigabytes(needed)}. Free some "
            "space, lower --checkpoint.keep, or set --run.dir to another disk."
        )
    # Some file systems count no inodes. A mounted bucket says that none is free.
    if system.f_files and 0 < system.f_favail < _NUM_INODES:
        raise ModelError(
            f"run.dir {directory}: {system.f_favail} inodes are free. Remove files, or set --run.dir to another disk."
        )


def find_export(name: str) -> Path:
    """Return the directory of a run's exported model; `name` may be that directory itself.

    Raises:
        ModelError: there is none, or it is not whole.
    """
    directory = find_model_directory(name)
    if directory is None:
        raise ModelError(f"run {name!r}: it is not a directory. Correct the path.")
    if missing := [file for file in EXPORT_FILES if not (directory / file).is_file()]:
        raise ModelError(f"run {name!r}: it has no exported model ({missing[0]} is missing). Finish its training first.")
    return directory


class SavedClassifier(NamedTuple):
    """A classifier from files, in eval mode, and how it reads texts."""

    classifier: Classifier
    tokenizer: PreTrainedTokenizerFast
    class_names: tuple[str, ...]
    max_length: int
    encoding: TextEncoding
    """Rules under which the answers are those of Hugging Face's pipeline; for our own exports those of training."""
    notes: tuple[str, ...]
    """Unusual things about the files, for the user."""


def load_classifier(name: str, *, revision: str | None = None) -> SavedClassifier:
    """Load an exported model or any GPT2ForSequenceClassification.

    The classifier is split where the training split it, if its config.json has that number. This matters under bf16, where only
    the trained weights stay in fp32.

    Raises:
        ModelError: as `load_backbone`; or the model has no head, one of another kind, or a single class.
    """
    check_config(name, revision, is_classifier=True)
    tokenizer = read_tokenizer(name, revision=revision)
    longest, num_special = tokenizer.model_max_length, tokenizer.num_special_tokens_to_add(pair=False)
    if type(longest) not in (int, float) or longest % 1 or longest < max(1, num_special):
        raise ModelError(
            f"tokenizer of {name!r}: its model_max_length is {longest!r}, and it adds {num_special} tokens to a text. "
            "Correct model_max_length in tokenizer_config.json."
        )
    encoding = TextEncoding(num_special > 0, tokenizer.split_special_tokens)
    if tokenizer.pad_token is None:
        # Fills the batches. No answer depends on it.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.padding_side = "right"
    backbone = load_backbone(name, revision=revision, init="pretrained", seed=0, tokenizer=tokenizer)
    if backbone.head_CD is None or not backbone.class_names:
        raise ModelError(
            f"model {name!r} has no classification head: its predictions would be random. "
            "Set --model.name to a run's directory, or to a GPT2ForSequenceClassification checkpoint."
        )
    if len(backbone.class_names) < 2:
        raise ModelError(
            f"model {name!r} has a single class: it is not a classifier. Set --model.name to a model with two classes or more."
        )
    _add_token_type(backbone.model, tokenizer, name)
    pad_id = backbone.pad_id
    if pad_id is not None and (encoding != TRAINING_ENCODING or can_produce(tokenizer, pad_id)):
        encoding = replace(encoding, pad_id=pad_id)
    num_blocks = len(backbone.model.h)
    stored = getattr(backbone.model.config, TRAINABLE_BLOCKS_KEY, 1)
    trainable_blocks = stored if type(stored) is int and 0 <= stored <= num_blocks else min(1, num_blocks)
    classifier = split_model(
        backbone,
        trainable_blocks=trainable_blocks,
        num_classes=len(backbone.class_names),
        seed=0,
        pooling=backbone.pooling,
        train_embeddings=trainable_blocks == num_blocks and getattr(backbone.model.config, TRAIN_EMBEDDINGS_KEY, False) is True,
    )
    max_length = int(min(tokenizer.model_max_length, classifier.config.n_positions))
    return SavedClassifier(classifier, tokenizer, backbone.class_names, max_length, encoding, backbone.notes)


def limit_length(saved: SavedClassifier, max_length: int) -> SavedClassifier:
    """Return the classifier with another number of tokens per text.

    Raises:
        ModelError: the model has fewer positions, or not even the special tokens have room.
    """
    check_max_length(max_length, saved.classifier.config.n_positions)
    num_special = saved.tokenizer.num_special_tokens_to_add(pair=False)
    if max_length < num_special:
        raise ModelError(
            f"data.max_length {max_length}: the tokenizer adds {num_special} tokens to a text. Set --data.max_length to more "
            f"than {num_special}."
        )
    return saved._replace(max_length=max_length)


def _add_token_type(model: GPT2Model, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Add the embedding of the token type, which Hugging Face takes from the tokens' table, to every position.

    Raises:
        ModelError: the tokenizer gives more than one type to the tokens of a text.
    """
    types = set(cast("list[int]", tokenizer("a text").get("token_type_ids", [])))
    if len(types) > 1:
        raise ModelError(
            f"tokenizer of {name!r}: it gives the token types {sorted(types)} to one text, and only one is supported. Remove "
            "token_type_ids from model_input_names in its tokenizer_config.json."
        )
    with torch.no_grad():
        for kind in types:
            model.wpe.weight = nn.Parameter(model.wpe.weight + model.wte.weight[kind])


def _huggingface_state(classifier: Classifier, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all weights by Hugging Face's names, in fp32 on the CPU, with the head's bias folded."""
    state = {name: weight.float() for name, weight in classifier.frozen_state.items()}
    suffix = {name: weight.detach().float().cpu() for name, weight in trained.items()}
    weight_CD, bias_C = suffix.pop("out_head.weight"), suffix.pop("out_head.bias", None)
    if (standard := classifier.suffix.standard) is not None:
        weight_CD, bias_C = fold_standard(weight_CD, bias_C, standard)
    if bias_C is not None:
        suffix["ln_f.bias"] = fold_bias(weight_CD, bias_C, suffix["ln_f.bias"])
    return state | {f"transformer.{name}": weight for name, weight in suffix.items()} | {"score.weight": weight_CD}


def _fold_scales(state: Mapping[str, Tensor], config: GPT2Config) -> dict[str, Tensor]:
    """Return the weights with unusual scales of the attention moved into the queries; `config` gets the usual ones.

    The default attention of transformers 4 ignores `scale_attn_weights` and `scale_attn_by_inverse_layer_idx`.
    """
    folded, width = dict(state), config.n_embd
    for block in range(config.n_layer):
        factor = 1.0 if config.scale_attn_weights else math.sqrt(width // config.n_head)
        factor /= block + 1 if config.scale_attn_by_inverse_layer_idx else 1
        for name in (f"transformer.h.{block}.attn.c_attn.{kind}" for kind in ("weight", "bias") if factor != 1):
            query, rest = folded[name].split([width, 2 * width], dim=-1)
            folded[name] = torch.cat([query * factor, rest], dim=-1)
    config.scale_attn_weights, config.scale_attn_by_inverse_layer_idx = True, False
    return folded


def _write_model(
    directory: Path, classifier: Classifier, state: dict[str, Tensor], pad_id: int | None, class_names: Sequence[str]
) -> None:
    config = copy.deepcopy(classifier.config)
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: i for i, name in enumerate(class_names)}
    config.pad_token_id = pad_id
    config.problem_type = "single_label_classification"
    config.dtype = "float32"
    # torch.export and ONNX take tensors alone, no cache object.
    config.use_cache = False
    setattr(config, TRAINABLE_BLOCKS_KEY, len(classifier.suffix.h))
    setattr(config, TRAIN_EMBEDDINGS_KEY, classifier.suffix.has_embeddings)
    state = _fold_scales(state, config)
    architecture = GPT2ForSequenceClassification
    if classifier.suffix.pooling == "mean":
        architecture, config = GPT2MeanPoolingForSequenceClassification, _write_mean_pooling(directory, config)
    with silence_transformers(), torch.random.fork_rng(devices=[]):
        # Built without memory. Strict, as a missing name would leave a random tensor in the export.
        with torch.device("meta"):
            model = architecture(config)
        model.load_state_dict({name: weight.contiguous() for name, weight in state.items()}, strict=True, assign=True)
        # `model.save_pretrained` writes the same bytes, and imports an installed DeepSpeed, which takes half a second.
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(directory)
        save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})


def _write_mean_pooling(directory: Path, config: GPT2Config) -> GPT2MeanPoolingConfig:
    """Write the code of a model with mean pooling; return its config, which names that code.

    Hugging Face's class would read the last token alone. The other type makes it refuse such a model by name.
    """
    code = Path(modeling_gpt2_mean_pooling.__file__).read_text(encoding="utf-8")
    (directory / MODELING_FILE).write_text(code, encoding="utf-8")
    mean = GPT2MeanPoolingConfig(**{key: value for key, value in config.to_dict().items() if key != "model_type"})
    module = MODELING_FILE.removesuffix(".py")
    mean.auto_map = {
        "AutoConfig": f"{module}.{GPT2MeanPoolingConfig.__name__}",
        "AutoModelForSequenceClassification": f"{module}.{GPT2MeanPoolingForSequenceClassification.__name__}",
    }
    return mean
