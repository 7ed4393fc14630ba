"""What only a GPU can show: bf16 by default, frozen weights stored in bf16 but exported untouched, the same classes as fp32;
variable-length attention over packed texts, whose result depends on no pack mate."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.events import read_events
from support.processes import torchrun
from support.random_gpt2 import assert_close, mask_of, ours_like, ragged_batch, random_reference
from torch import Tensor

from agnews_dist.model import packed
from agnews_dist.model.gpt2 import load_backbone
from agnews_dist.model.last_token import select_last_rows
from agnews_dist.model.prefix import CALL_TOKENS
from agnews_dist.model.pretrained import load_tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DATA = ["--data.source", "synthetic", "--data.limit_train", "1200", "--data.limit_test", "400"]


def test_one_rank_trains_in_bf16_and_agrees_with_fp32(tmp_path):
    command = ["-m", "agnews_dist.train", "--model.name", "embedded", *DATA, "--optim.lr", "3e-3"]
    places = ["--run.dir", str(tmp_path), "--run.name", "gpu", "--data.cache_dir", str(tmp_path / "cache")]
    torchrun(1, *command, *places, "--engine.device", "cuda", CUDA_VISIBLE_DEVICES="0")
    directory = tmp_path / "gpu"
    (started,) = [event for event in read_events(directory / "events.jsonl") if event["event"] == "RunStarted"]
    assert started["facts"]["device"].endswith(", bf16")
    result = json.loads((directory / "result.json").read_text())
    assert result["splits"]["test"]["accuracy"] > 0.6
    assert 0 < result["seconds"]["prefix"] < result["seconds"]["train"]

    tokenizer = load_tokenizer("embedded", revision=None, pad_token="new")
    source = load_backbone("embedded", revision=None, init="pretrained", seed=0, tokenizer=tokenizer).model.state_dict()
    exported = load_file(directory / "model" / "model.safetensors")
    for name in ("wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "h.2.mlp.c_proj.weight"):
        assert exported[f"transformer.{name}"].equal(source[name]), name

    predictions = {}
    for precision in ("bf16", "fp32"):
        output = tmp_path / precision
        arguments = ["--model.name", str(directory), *DATA, "--split", "test", "--output", str(output)]
        flags = ["--engine.precision", precision, "--data.cache_dir", str(tmp_path / "cache")]
        torchrun(1, "-m", "agnews_dist", "evaluate", *arguments, *flags, CUDA_VISIBLE_DEVICES="0")
        lines = (output / "predictions-test.jsonl").read_text().splitlines()
        predictions[precision] = [json.loads(line)["prediction"] for line in lines]
    assert len(predictions["fp32"]) == 400
    agreeing = sum(a == b for a, b in zip(predictions["bf16"], predictions["fp32"], strict=True))
    assert agreeing >= 390, "bf16 may turn a few close calls, not more"


CUDA = torch.device("cuda", 0)
LENGTHS = [31, 31, 17, 17, 17, 9, 2, 1, 1, 23]
"""Runs of neighbours, single ones, one token, and the longest that the small model takes but one."""
SHAPE: dict[str, object] = {"n_embd": 128, "n_head": 2}
"""Heads as wide as GPT-2's: the kernel has requirements on them."""


def root_mean_square(difference: Tensor) -> float:
    return float(difference.float().square().mean().sqrt())


def packed_of(values_BT: Tensor, lengths_B: Tensor) -> Tensor:
    return torch.cat([row[:length] for row, length in zip(values_BT, lengths_B.tolist(), strict=True)])


@pytest.fixture
def spied(monkeypatch) -> list[str]:
    """Which attention ran, in order: 'kernel' or 'runs'."""
    seen: list[str] = []

    def noting(name, function):
        return lambda *arguments: seen.append(name) or function(*arguments)

    monkeypatch.setattr(packed, "_attend_by_kernel", noting("kernel", packed._attend_by_kernel))
    monkeypatch.setattr(packed, "_attend_by_runs", noting("runs", packed._attend_by_runs))
    return seen


@pytest.mark.parametrize("factor", [64**-0.5, 1.0, 0.03])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_variable_length_attention_is_attention_in_runs(dtype, factor, spied):
    """The kernel in half precision against runs of equal lengths in fp64 on the same rounded numbers."""
    assert packed._find_varlen_kernel() is not None, "this release of torch has no variable-length attention"
    generator = torch.Generator().manual_seed(1)
    qkv_P = torch.randn(sum(LENGTHS), 3 * 128, generator=generator).to(CUDA, dtype)
    attended_PD = packed.make_packed_attention(LENGTHS, CUDA, dtype)(qkv_P, 2, factor)
    assert spied == ["kernel"]
    exact_PD = packed.make_packed_attention(LENGTHS, CUDA, torch.float64)(qkv_P.double(), 2, factor)
    assert spied == ["kernel", "runs"]
    assert attended_PD.dtype == dtype
    assert_close(attended_PD.double(), exact_PD, "attention", relative=4 * torch.finfo(dtype).eps)
    shifted_PD = packed.make_packed_attention(LENGTHS[1:] + LENGTHS[:1], CUDA, dtype)(qkv_P, 2, factor)
    with pytest.raises(AssertionError, match="attention"):  # the negative control: texts that begin elsewhere
        assert_close(shifted_PD.double(), exact_PD, "attention", relative=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("trainable_blocks", [0, 1, "all"])
def test_bf16_rows_are_huggingface_s(trainable_blocks, spied):
    """They err no more from fp32 than Hugging Face's own bf16 forward does on the padded batch with its mask."""
    reference = random_reference(pad_token_id=0, **SHAPE)
    half = ours_like(reference, trainable_blocks).prefix.to(CUDA, torch.bfloat16)
    tokens_BT, lengths_B = ragged_batch(LENGTHS, low=1, high=97, pad_id=0)
    mask_BT = mask_of(tokens_BT, lengths_B)
    number = len(half.h) - 1

    def hidden(model: torch.nn.Module, device: torch.device) -> Tensor:
        outputs: list[Tensor] = []
        module = model.h[number] if number >= 0 else model.drop
        handle = module.register_forward_hook(lambda _m, _i, output: outputs.append(output))
        with torch.no_grad():
            model(input_ids=tokens_BT.to(device), attention_mask=mask_BT.to(device))
        handle.remove()
        output = outputs[0]
        hidden_BTD = (output[0] if isinstance(output, tuple) else output).cpu()
        return select_last_rows(hidden_BTD, lengths_B) if half.one_row_per_text else packed_of(hidden_BTD, lengths_B)

    exact = hidden(reference.transformer, torch.device("cpu"))
    rounded = hidden(reference.transformer.to(CUDA, torch.bfloat16), CUDA)
    rows = half.rows(packed_of(tokens_BT, lengths_B).to(CUDA), LENGTHS)
    # The last block of `trainable_blocks: 0` needs one query per text and no kernel.
    assert spied == ["kernel"] * (len(half.h) - half.one_row_per_text)
    assert rows.dtype == torch.bfloat16
    theirs = root_mean_square(rounded - exact)
    assert 0 < theirs < 0.02 * root_mean_square(exact)
    assert 0 < root_mean_square(rows.cpu() - exact) < 1.5 * theirs


@pytest.mark.parametrize("trainable_blocks", [0, 1, 2])
def test_fp32_uses_runs_and_equals_huggingface(trainable_blocks, spied):
    """The kernel knows no fp32. (TF32 is off by default; it would cost three digits.)"""
    reference = random_reference(pad_token_id=0, **SHAPE).to(CUDA)
    tokens_BT, lengths_B = ragged_batch(LENGTHS, low=1, high=97, pad_id=0)
    classifier = ours_like(reference, trainable_blocks)
    with torch.no_grad():
        expected = reference(input_ids=tokens_BT.to(CUDA), attention_mask=mask_of(tokens_BT, lengths_B).to(CUDA)).logits
        actual = classifier.logits(tokens_BT.to(CUDA), lengths_B.to(CUDA))
    assert set(spied) == {"runs"}
    assert_close(actual.cpu(), expected.cpu(), "logits")


def test_attention_of_a_text_depends_on_no_pack_mate(spied):
    """To the last bit: otherwise its sums would be cut by the longest text of its pack. Lengths that make splitting pay."""
    long, length = 4096, 900
    generator = torch.Generator().manual_seed(1)
    qkv_P = torch.randn(length + long, 3 * 128, generator=generator).to(CUDA, torch.bfloat16)
    alone_PD = packed.make_packed_attention([length], CUDA, torch.bfloat16)(qkv_P[:length], 2, 0.125)
    mates = {"behind": [length, long], "many": [length, *[64] * 64], "one token": [length, 1]}
    for name, lengths in mates.items():
        together_PD = packed.make_packed_attention(lengths, CUDA, torch.bfloat16)(qkv_P[: sum(lengths)], 2, 0.125)
        assert torch.equal(together_PD[:length], alone_PD), name
    first = packed.make_packed_attention([long, length], CUDA, torch.bfloat16)(qkv_P.roll(long, dims=0), 2, 0.125)
    assert torch.equal(first[long:], alone_PD), "before"
    assert set(spied) == {"kernel"}


def test_features_on_a_gpu_are_those_of_the_cpu(monkeypatch):
    """In fp32, over several calls, which on a GPU follow each other."""
    monkeypatch.setitem(CALL_TOKENS, "cuda", 40)
    monkeypatch.setitem(CALL_TOKENS, "cpu", 40)
    tokens_BT, lengths_B = ragged_batch(LENGTHS, low=1, high=97, pad_id=0)
    on_cpu = ours_like(random_reference(**SHAPE), 1).prefix.features(tokens_BT, lengths_B)
    half = ours_like(random_reference(**SHAPE), 1).prefix.to(CUDA)
    on_gpu = half.features(tokens_BT.to(CUDA), lengths_B.to(CUDA))
    assert on_gpu.hidden_BTD.device == on_gpu.lengths_B.device == CUDA
    assert torch.equal(on_gpu.lengths_B.cpu(), on_cpu.lengths_B)
    assert_close(on_gpu.hidden_BTD.cpu(), on_cpu.hidden_BTD, "features")
