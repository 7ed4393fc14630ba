"""An exported model as an ONNX file, which is checked against the model itself before it appears."""

import logging
import warnings
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2ForSequenceClassification

from agnews_dist.data.hugging_face import silence_transformers, translate_errors
from agnews_dist.errors import ModelError
from agnews_dist.model.modeling_gpt2_mean_pooling import GPT2MeanPoolingConfig, GPT2MeanPoolingForSequenceClassification

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-5
"""Limit of a logit's difference, relative to max(1, the largest logit)."""
_LARGEST_FILE = 1_800_000_000
"""Bytes of weights in one file. Protocol buffers end at 2 GB; a larger model has a second file, FILE.data."""
_LENGTHS = ((1,), (5, 1, 3, 2), (7, 7, 2))
"""Tokens per text of the batches that are compared, as shares of ten of the longest text."""


def check_onnx_packages() -> None:
    """Check that the packages are installed; raise ModelError with the command that installs them."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ModelError(f"--format onnx: {', '.join(missing)} not installed. Install with: pip install {' '.join(missing)}.")


def write_onnx(directory: Path, output: Path) -> float:
    """Write the model in `directory` as an ONNX file; return the largest difference of a logit from the model's own.

    Inputs are `input_ids` and `attention_mask` of any number of texts and tokens, right-padded; the output is `logits`.

    Raises:
        ModelError: the model cannot be read or converted, the file is not valid or answers differently, or cannot be written.
    """
    if output.suffix.lower() != ".onnx":
        raise ModelError(f"--output {str(output)!r}: the name of an ONNX file ends in .onnx. Rename it.")

    def make_error(reason: str) -> ModelError:
        return ModelError(f"model {directory} cannot be written as {output}: {reason}. Export it again with other versions.")

    with warnings.catch_warnings(), translate_errors(make_error), silence_transformers():
        warnings.simplefilter("ignore")
        is_mean = GPT2Config.get_config_dict(directory)[0].get("model_type") == GPT2MeanPoolingConfig.model_type
        architecture = GPT2MeanPoolingForSequenceClassification if is_mean else GPT2ForSequenceClassification
        model = architecture.from_pretrained(directory).eval()
        try:
            if output.exists() and not output.is_file():
                raise ModelError(f"--output {str(output)!r}: it exists and is not a file. Choose another name.")
            output.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=output.parent, prefix=".onnx-") as building:
                file = Path(building) / output.name
                _convert(model, file)
                difference = _check(model, file)
                # The weights first: a file without them would be damaged.
                for path in sorted(Path(building).iterdir(), key=lambda path: path == file):
                    path.replace(output.parent / path.name)
        except OSError as error:
            reason = error.strerror or error
            raise ModelError(
                f"--output {str(output)!r}: it cannot be written ({reason}). Set it to a writable place with free space."
            ) from error
    return difference


def _convert(model: GPT2ForSequenceClassification, file: Path) -> None:
    num_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    tokens_BT, mask_BT = _make_batch(model, (3, 2))
    free: dict[int, Any] = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens", max=model.config.n_positions)}
    registry = logging.getLogger("torch.onnx")
    level = registry.level
    registry.setLevel(logging.ERROR)
    try:
        torch.onnx.export(
            model,
            (),
            file,
            kwargs={"input_ids": tokens_BT, "attention_mask": mask_BT},
            dynamo=True,
            verbose=False,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": free, "attention_mask": free},
            external_data=num_bytes > _LARGEST_FILE,
        )
    finally:
        registry.setLevel(level)


def _check(model: GPT2ForSequenceClassification, file: Path) -> float:
    """Check the file, and its logits of ragged batches; return their largest difference."""
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(file), full_check=True)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    largest = 0.0
    for tenths in _LENGTHS:
        tokens_BT, mask_BT = _make_batch(model, [max(1, model.config.n_positions * share // 10) for share in tenths])
        with torch.no_grad():
            expected_BC = cast(Tensor, model(input_ids=tokens_BT, attention_mask=mask_BT).logits)
        [found_BC] = session.run(None, {"input_ids": tokens_BT.numpy(), "attention_mask": mask_BT.numpy()})
        difference = float((torch.from_numpy(found_BC) - expected_BC).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(expected_BC.abs().max())):
            raise ModelError(
                f"ONNX file of {file.name}: its logits differ from the model's by {difference:.2g}. "
                "Export it again with other versions of torch and onnxruntime."
            )
        largest = max(largest, difference)
    return largest


def _make_batch(model: GPT2ForSequenceClassification, lengths: "tuple[int, ...] | list[int]") -> tuple[Tensor, Tensor]:
    """Return random right-padded tokens_BT without the pad token, and their mask."""
    pad_id = model.config.pad_token_id
    mask_BT = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    tokens_BT = torch.randint(model.config.vocab_size, mask_BT.shape, generator=torch.Generator().manual_seed(0))
    if pad_id is not None:
        tokens_BT[tokens_BT == pad_id] = (pad_id + 1) % model.config.vocab_size
        tokens_BT[mask_BT == 0] = pad_id
    return tokens_BT, mask_BT
