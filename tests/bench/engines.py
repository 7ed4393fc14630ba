"""What an engine costs: seconds per update of the same suffix under every engine, on real processes of this machine.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 tests/bench/engines.py [--width 768] [--steps 20] [--blocks 1]

Random features of 32 texts stand for the frozen part's kept output, so that only what the engines differ in is timed. Engines
take turns for `--rounds` rounds; a line gives the median over rounds of the mean seconds per update, on the slowest rank, and
its ratio to DDP's in the same run, as JSON lines. Also DDP with other bucket sizes and plain torch DDP without any of ours.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from statistics import median

import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import GPT2Config, GPT2Model

from agnews_dist.distributed import collectives
from agnews_dist.distributed.world import detect_world
from agnews_dist.engine import engine as engine_module
from agnews_dist.engine.deepspeed_config import ZeroOptions
from agnews_dist.engine.engine import Engine
from agnews_dist.model.gpt2 import Backbone, split_model
from agnews_dist.model.suffix import Suffix
from agnews_dist.report.result_files import versions
from agnews_dist.training.optim import build_optimizer

TEXTS, TOKENS = 16, 56


def make_suffix(width: int, blocks: int) -> Suffix:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=width, n_layer=blocks, n_head=width // 64, vocab_size=8, bos_token_id=None, eos_token_id=None)
    return split_model(Backbone(GPT2Model(config), None, None), trainable_blocks="all", num_classes=4, seed=0).suffix


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("width", 768), ("steps", 20), ("blocks", 1), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given, world = parser.parse_args(), detect_world(os.environ)
    own_bucket = engine_module.choose_bucket_megabytes
    hidden_BTD, lengths_B = torch.randn(TEXTS, TOKENS, given.width), torch.full((TEXTS,), TOKENS)
    labels_B = torch.arange(TEXTS) % 4

    def ours(zero: ZeroOptions | None = None, *, bucket: int | None = None, **options: bool) -> Callable[[], None]:
        def job() -> None:
            engine_module.choose_bucket_megabytes = own_bucket if bucket is None else lambda _: bucket
            AcceleratorState._reset_state(True)  # accelerate knows one engine per process
            engine = Engine(world, device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=300, zero=zero, **options)
            suffix = make_suffix(given.width, given.blocks)
            wrapped = engine.prepare(suffix, build_optimizer(suffix, lr=1e-4, weight_decay=0.01), max_grad_norm=1.0)

            def step() -> None:
                with wrapped.accumulate(is_last=True):
                    wrapped.backward(nn.functional.cross_entropy(wrapped(hidden_BTD, lengths_B), labels_B))
                wrapped.update()

            measure(step)

        return job

    def plain_ddp() -> None:
        suffix = make_suffix(given.width, given.blocks)
        module = nn.parallel.DistributedDataParallel(suffix)
        optimizer = torch.optim.AdamW(suffix.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            nn.functional.cross_entropy(module(hidden_BTD, lengths_B), labels_B).backward()
            nn.utils.clip_grad_norm_(suffix.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        measure(step)

    seconds: dict[str, list[float]] = {}

    def measure(step: Callable[[], None]) -> None:
        for _ in range(3):
            step()
        collectives.all_gather(0)
        start = time.perf_counter()
        for _ in range(given.steps):
            step()
        seconds.setdefault(name, []).append(max(collectives.all_gather((time.perf_counter() - start) / given.steps)))

    cases = {
        "ddp": ours(),
        "plain torch DDP": plain_ddp,
        "ddp, gradients in bf16": ours(compress_gradients=True),
        **{f"ddp, buckets of {size} MiB": ours(bucket=size) for size in (1, 4, 25, 128)},
        "fsdp": ours(fsdp=True),
        **{f"ZeRO-{stage}": ours(ZeroOptions(stage)) for stage in (1, 2, 3)},
        "ZeRO-2, offload optimizer": ours(ZeroOptions(2, "optimizer")),
        "ZeRO-3, offload all": ours(ZeroOptions(3, "all")),
    }
    for _ in range(given.rounds):
        for name, job in cases.items():  # noqa: B007  # `measure` reads the name
            job()
    if world.is_main:
        about = vars(given) | {"num_ranks": world.num_ranks, "threads": torch.get_num_threads(), "versions": versions()}
        print(json.dumps(about))
        for name, found in seconds.items():
            ratio = round(median(found) / median(seconds["ddp"]), 3)
            line = {"case": name, "seconds": [round(value, 5) for value in found], "median_over_ddp": ratio}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
    collectives.close()
