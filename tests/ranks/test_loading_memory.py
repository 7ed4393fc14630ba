"""Processes of a node that load one checkpoint share its memory pages: it is in memory once, not once per process."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import REPOSITORY, environment
from transformers import GPT2Config, GPT2LMHeadModel

from agnews_dist.model.pretrained import load_tokenizer

NUM_PROCESSES = 2
LOADER = """
import sys
import psutil
import torch
from agnews_dist.model.gpt2 import load_backbone, split_model
from agnews_dist.model.pretrained import load_tokenizer
from agnews_dist.run.fingerprints import weights_fingerprint

def report_memory():
    print(flush=True)
    sys.stdin.readline()
    # A page that n processes map counts one n-th in each.
    print(psutil.Process().memory_full_info().pss, flush=True)
    sys.stdin.readline()

tokenizer = load_tokenizer(sys.argv[1], revision=None, pad_token="new")
report_memory()
backbone = load_backbone(sys.argv[1], revision=None, init="pretrained", seed=0, tokenizer=tokenizer)
classifier = split_model(backbone, trainable_blocks=1, num_classes=4, seed=0)
if sys.argv[2] == "copied":
    classifier.prefix._apply(torch.clone)
weights_fingerprint(classifier.frozen_state)  # reads every frozen weight, as a run does
report_memory()
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in fp32, like GPT-2 on the hub; blocks are nearly all of it."""
    directory = tmp_path_factory.mktemp("checkpoint")
    tokenizer = load_tokenizer("embedded", revision=None, pad_token="eos")
    tokenizer.save_pretrained(directory)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=512, n_layer=24, n_head=8, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


def growth(checkpoint: Path, how: str) -> float:
    """Return the memory that loading adds to all processes together, as a multiple of the checkpoint."""
    size = (checkpoint / "model.safetensors").stat().st_size
    assert size > 250 * 2**20, "large compared with the other memory of a process"
    command = [sys.executable, "-c", LOADER, str(checkpoint), how]
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment(), cwd=REPOSITORY)
        for _ in range(NUM_PROCESSES)
    ]

    def total() -> int:
        for process in processes:  # wait for all
            assert process.stdout is not None
            assert process.stdout.readline() == "\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        num_bytes = sum(int(process.stdout.readline()) for process in processes if process.stdout)
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        return num_bytes

    try:
        before = total()
        return (total() - before) / size
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells shared pages apart")
def test_checkpoint_is_in_memory_once_per_node(checkpoint: Path) -> None:
    assert growth(checkpoint, "mapped") < 1.4
    assert growth(checkpoint, "copied") > 1.8, "the control: a copy per process is noticed"
