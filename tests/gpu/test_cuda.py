"""What only a GPU can show: bf16 by default, frozen weights stored in bf16 but exported untouched, the same classes as fp32."""

import json

import pytest
import torch
from launching import torchrun
from safetensors.torch import load_file

from agnews_dist.model.gpt2 import load_backbone
from agnews_dist.model.tokenizer import load_tokenizer
from agnews_dist.report.runlog import read_run_log

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DATA = ["--data.source", "synthetic", "--data.limit_train", "1200", "--data.limit_test", "400"]


def test_one_rank_trains_in_bf16_and_agrees_with_fp32(tmp_path):
    command = ["-m", "agnews_dist.train", "--model.name", "embedded", *DATA, "--optim.lr", "3e-3"]
    places = ["--run.dir", str(tmp_path), "--run.name", "gpu", "--data.cache_dir", str(tmp_path / "cache")]
    torchrun(1, *command, *places, "--engine.device", "cuda", CUDA_VISIBLE_DEVICES="0")
    directory = tmp_path / "gpu"
    (started,) = [event for event in read_run_log(directory / "events.jsonl") if event["event"] == "RunStarted"]
    assert started["facts"]["precision"] == "bf16"
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
        torchrun(1, "-m", "agnews_dist.evaluate", *arguments, *flags, CUDA_VISIBLE_DEVICES="0")
        lines = (output / "predictions-test.jsonl").read_text().splitlines()
        predictions[precision] = [json.loads(line)["prediction"] for line in lines]
    assert len(predictions["fp32"]) == 400
    agreeing = sum(a == b for a, b in zip(predictions["bf16"], predictions["fp32"], strict=True))
    assert agreeing >= 390, "bf16 may turn a few close calls, not more"
