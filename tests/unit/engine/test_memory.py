"""Memory estimate: counts equal those of the model and of autograd, engines shard as documented, proposed settings fit.

tests/bench/memory.py compares it with measured peaks of whole runs (RESULTS.md).
"""

from dataclasses import replace

import pytest
import torch
from support.processes import REPOSITORY
from transformers import GPT2Config, GPT2Model

from agnews_dist.config.schema import BatchConfig, Config, DataConfig
from agnews_dist.data.batching.loader import EVALUATION_TOKENS
from agnews_dist.distributed.world import World
from agnews_dist.engine.memory import (
    MEAN_TOKENS,
    TOLERANCE,
    Estimate,
    Setup,
    Shape,
    estimate,
    estimate_activation_bytes,
    estimate_members,
    explain_misfit,
    format_estimate,
    propose_settings,
)
from agnews_dist.model.gpt2 import Backbone, has_head_bias, split_model
from agnews_dist.model.prefix import CALL_TOKENS
from agnews_dist.run.memory_setup import build_shape, count_texts_per_rank

XL = Shape(num_blocks=48, width=1600, inner=6400, num_heads=25, num_rows=50258, num_positions=1024)


def setup(**changed: object) -> Setup:
    values: dict[str, object] = {"trainable_blocks": 1, "num_ranks": 1, "ranks_per_node": 1, "backend": "ddp"}
    values |= {"zero_stage": 2, "offload": "none", "max_tokens_per_rank": 4096, "max_length": 64, "num_classes": 4}
    device = str(changed.get("device", "cuda"))
    values |= {"device": device, "half": False, "call_tokens": CALL_TOKENS[device]}
    return Setup(**{**values, "evaluation_tokens": EVALUATION_TOKENS, **changed})  # type: ignore[arg-type]


def gpt2(**changed: object) -> GPT2Config:
    sizes = {"n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 50, "n_positions": 128}
    return GPT2Config(**{**sizes, "bos_token_id": None, "eos_token_id": None, **changed})


@pytest.mark.parametrize("inner", [None, 100])
@pytest.mark.parametrize("blocks", [0, 1, 3, 4])
def test_shape_counts_the_weights_of_the_model(blocks: int, inner: int | None) -> None:
    config = gpt2(n_inner=inner)
    shape = build_shape(config)
    classifier = split_model(Backbone(GPT2Model(config), None, None), trainable_blocks=blocks, num_classes=7, seed=0)
    assert shape.count_trainable(blocks, 7) == sum(weight.numel() for weight in classifier.suffix.parameters())
    pad_row = config.n_embd  # [PAD], which the tokenizer adds
    assert shape.count_frozen(blocks) == sum(weight.numel() for weight in classifier.prefix.parameters()) + pad_row


def test_shape_counts_trained_embeddings() -> None:
    config = gpt2()
    shape, backbone = build_shape(config), Backbone(GPT2Model(config), None, None)
    classifier = split_model(backbone, trainable_blocks="all", num_classes=7, seed=0, train_embeddings=True)
    pad_row = config.n_embd
    trained = sum(weight.numel() for weight in classifier.suffix.parameters())
    assert shape.count_trainable(4, 7, train_embeddings=True) == trained + pad_row
    assert shape.count_frozen(4, train_embeddings=True) == sum(weight.numel() for weight in classifier.prefix.parameters()) == 0
    full, frozen = (estimate(XL, setup(trainable_blocks=48, train_embeddings=each)) for each in (True, False))
    assert full.device["optimizer"] - frozen.device["optimizer"] == 8 * XL.embeddings
    assert "frozen weights" not in full.device
    assert any("--model.train_embeddings false" in flags for flags, _ in propose_settings(setup(train_embeddings=True)))


def test_mean_pooling_runs_the_last_block_for_all_tokens() -> None:
    last, mean = (
        estimate_activation_bytes(XL, setup(pooling=pooling, evaluation_tokens=64, call_tokens=64))
        for pooling in ("last", "mean")
    )
    assert mean > 2 * last


@pytest.mark.slow
@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("blocks", [1, 3])
def test_activation_bytes_are_close_to_what_autograd_keeps(blocks: int, half: bool, fast_path: bool) -> None:
    """Count on Hugging Face's blocks with dropout, on a CPU, where attention keeps its scores."""
    config, texts, tokens = gpt2(n_embd=256, n_head=4, n_layer=blocks), 480 if blocks == 1 else 120, MEAN_TOKENS
    suffix = split_model(Backbone(GPT2Model(config), None, None), trainable_blocks="all", num_classes=4, seed=0).suffix
    suffix.autocast_dtype = torch.bfloat16 if half else None
    suffix.use_fast_path(fast_path)
    weights = {weight.untyped_storage().data_ptr() for weight in suffix.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        suffix.train()(torch.randn(texts, tokens, config.n_embd), torch.full((texts,), tokens))
    base = setup(trainable_blocks=blocks, max_tokens_per_rank=texts * tokens, max_length=tokens, device="cpu")
    estimated = estimate_activation_bytes(build_shape(config), replace(base, half=half, fast_path=fast_path))
    # The estimate includes the backward pass of a block and the features.
    assert 0.9 * sum(kept.values()) < estimated < 2.1 * sum(kept.values())
    twice = replace(base, half=half, fast_path=fast_path, num_passes=2)
    assert estimate_activation_bytes(build_shape(config), twice) > 1.8 * estimated
    less = estimate_activation_bytes(
        build_shape(config), replace(base, half=half, fast_path=fast_path, activation_checkpointing=True)
    )
    assert less < estimated if blocks == 3 else less <= estimated


def test_estimate_shards_what_each_engine_shards() -> None:
    """Check XL with all blocks on 8 ranks: 16 bytes per weight under DDP, less in each stage as in the ZeRO paper."""
    all_blocks = setup(trainable_blocks=48, num_ranks=8, ranks_per_node=8)
    total = XL.count_trainable(48, 4)
    weights, gradients, optimizer = ("weights that train", "gradients", "optimizer")
    ddp = estimate(XL, all_blocks).device
    assert (ddp[weights], ddp[gradients], ddp[optimizer]) == (4 * total, 4 * total, 8 * total)
    assert estimate(XL, replace(all_blocks, has_average=True)).device[optimizer] == 12 * total
    stages = [estimate(XL, replace(all_blocks, backend="deepspeed", zero_stage=stage)).device for stage in (1, 2, 3)]
    for name, first_stage in ((optimizer, 1), (gradients, 2), (weights, 3)):
        for stage, found in enumerate(stages, 1):
            if stage < first_stage:
                assert found[name] == ddp[name]
            else:
                # By default stage 3 keeps up to a billion gathered weights until the backward pass.
                assert found[name] < (0.9 if name == weights else 0.4) * ddp[name]
    fsdp = estimate(XL, replace(all_blocks, backend="fsdp")).device
    assert sum(fsdp[name] for name in (weights, gradients, optimizer)) < 0.2 * 16 * total
    offloaded = estimate(XL, replace(all_blocks, backend="deepspeed", zero_stage=3, offload="all"))
    assert optimizer not in offloaded.device
    assert offloaded.host[optimizer] == stages[2][optimizer] + 8 * -(-total // 8)
    assert offloaded.host["weights that train"] == 4 * -(-total // 8)
    assert offloaded.device_bytes < estimate(XL, replace(all_blocks, backend="deepspeed", zero_stage=3)).device_bytes


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_estimate_of_members_counts_what_each_of_them_keeps(device: str) -> None:
    total = XL.count_trainable(1, 4)
    one, eight = (estimate_members(XL, setup(device=device, has_average=True, runtime_bytes=9), number) for number in (1, 8))
    # Weights, two moments and an average; on the host of a GPU the best weights.
    on_device = (5 if device == "cpu" else 4) * 4 * total
    assert eight.device_bytes - one.device_bytes == 7 * on_device
    assert eight.host == ({} if device == "cpu" else {"best weights": 8 * 4 * total})
    assert "checkpoint" not in eight.device
    # On a CPU the measured bytes hold the model.
    assert ("frozen weights" in one.device) is (device == "cuda")


def test_estimate_on_a_cpu_has_one_memory() -> None:
    on_gpu, on_cpu = (estimate(XL, setup(device=device, runtime_bytes=5)) for device in ("cuda", "cpu"))
    assert on_gpu.host == {"best weights": 4 * XL.count_trainable(1, 4), "checkpoint": 12 * XL.count_trainable(1, 4)}
    assert on_cpu.host == {}
    assert on_cpu.device["best weights"] == on_gpu.host["best weights"]
    assert on_cpu.device["libraries"] == 5
    assert on_cpu.device["frozen weights"] == 4 * XL.count_frozen(1)
    half = estimate(XL, setup(half=True))
    assert half.device["frozen weights"] == 2 * XL.count_frozen(1)
    shared = estimate(XL, setup(device="cpu", ranks_per_node=4, shares_frozen=True))
    embedding = 4 * XL.num_rows * XL.width  # [PAD] makes a copy per rank
    assert shared.device["frozen weights"] == embedding + (4 * XL.count_frozen(1) - embedding) // 4


def test_small_global_batches_need_less_memory() -> None:
    """Check that a rank's share of a small global batch counts, not its token limit."""
    base = setup(trainable_blocks=4, max_tokens_per_rank=16384, device="cpu")
    assert estimate_activation_bytes(XL, replace(base, texts_per_rank=64)) < 0.3 * estimate_activation_bytes(XL, base)
    assert estimate_activation_bytes(XL, replace(base, texts_per_rank=10**6)) == estimate_activation_bytes(XL, base)
    config = Config(batch=BatchConfig(global_batch_size=33))
    assert count_texts_per_rank(config, World(num_ranks=8), use_cuda=False) == 5
    assert 5 < (count_texts_per_rank(config, World(num_ranks=8), use_cuda=True) or 0) <= 33
    budget = Config(batch=BatchConfig(global_token_budget=1000), data=DataConfig(max_length=100))
    assert count_texts_per_rank(budget, World(), use_cuda=True) == 10


def test_explain_misfit_allows_for_the_error_of_the_estimate() -> None:
    needs = estimate(XL, setup()).device_bytes
    assert explain_misfit(XL, setup(), free_device=needs, free_host=10**12) is None
    assert explain_misfit(XL, setup(), free_device=int(needs * (1 - TOLERANCE)) + 1, free_host=10**12) is None
    assert explain_misfit(XL, setup(), free_device=int(needs * (1 - TOLERANCE)) - 10, free_host=10**12) is not None


@pytest.mark.parametrize("gigabytes", [16, 24, 40, 80])
def test_proposed_settings_fit(gigabytes: int) -> None:
    """Check the first proposal for GPT-2 XL with all blocks on 8 ranks of a node."""
    too_large = setup(trainable_blocks=48, num_ranks=8, ranks_per_node=8, max_tokens_per_rank=65536)
    text = explain_misfit(XL, too_large, free_device=gigabytes * 10**9, free_host=10**12)
    assert text is not None
    assert f"{gigabytes}.0 GB are free on this rank's device: it would run out of memory." in text
    assert text.startswith("the run needs about ")
    first = text.split("Each of these would fit: ")[1].split(";")[0].rstrip(".")
    proposed = dict(propose_settings(too_large))
    assert estimate(XL, proposed[first]).device_bytes <= gigabytes * 10**9


def test_explain_misfit_names_the_least_memory_if_nothing_fits() -> None:
    text = explain_misfit(XL, setup(), free_device=10**9, free_host=10**12)
    assert text is not None
    assert "Use a smaller model or more memory: with one trainable block it needs 10.8 GB." in text


def test_explain_misfit_counts_host_memory_of_offloading() -> None:
    too_large = setup(trainable_blocks=48, num_ranks=2, ranks_per_node=2, backend="deepspeed", offload="optimizer", half=True)
    text = explain_misfit(XL, too_large, free_device=10**12, free_host=20 * 10**9)
    assert text is not None
    assert "per rank in host memory; 20.0 GB are free in this node's memory" in text


def test_format_estimate_puts_the_largest_part_first() -> None:
    found = Estimate({"gradients": 10**6, "optimizer": 2 * 10**9})
    assert format_estimate(found) == "about 2.0 GB per rank: optimizer 2.0 GB, gradients 1 MB"


SIZES = {"gpt2": (768, 12, 12), "gpt2-medium": (1024, 24, 16), "gpt2-large": (1280, 36, 20), "gpt2-xl": (1600, 48, 25)}
COLUMNS: tuple[dict[str, object], ...] = (
    {},
    {"backend": "fsdp"},
    *({"backend": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3)),
    {"backend": "deepspeed", "zero_stage": 3, "offload": "all"},
)


def memory_table() -> list[str]:
    """Return the rows of the documented table.

    GB per rank for 8 GPUs of a node, bf16 and default batches, with activation checkpointing from two trainable blocks on.
    """
    rows = []
    for name, (width, blocks, heads) in SIZES.items():
        shape = Shape(num_blocks=blocks, width=width, inner=4 * width, num_heads=heads, num_rows=50258, num_positions=1024)
        for trained in (1, blocks // 2, blocks):
            base = setup(trainable_blocks=trained, num_ranks=8, ranks_per_node=8, max_tokens_per_rank=16384)
            base = replace(base, max_length=256, half=True, activation_checkpointing=trained > 1)
            sizes = [estimate(shape, replace(base, **changed)).device_bytes / 1e9 for changed in COLUMNS]  # type: ignore[arg-type]
            rows.append(f"| {name} | {trained} of {blocks} | " + " | ".join(f"{size:.1f}" for size in sizes) + " |")
    return rows


def test_the_documented_memory_table_is_the_estimate() -> None:
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    assert [row for row in memory_table() if row not in text] == []


@pytest.mark.parametrize("num_classes", [2, 64, 65, 150])
def test_the_heads_bias_is_counted_where_the_model_has_one(num_classes: int) -> None:
    shape = Shape(num_blocks=1, width=128, inner=512, num_heads=2, num_rows=9, num_positions=9)
    has_bias = has_head_bias(num_classes, 128)
    assert shape.count_trainable(0, num_classes) == 2 * 128 + num_classes * 128 + num_classes * has_bias
