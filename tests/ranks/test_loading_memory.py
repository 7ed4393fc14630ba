"""Processes of a node that load one checkpoint share its memory pages: it is in memory once, not once per process."""

import sys
from pathlib import Path

import pytest
from support import fork_server
from transformers import GPT2Config, GPT2LMHeadModel

from agnews_dist.model.pretrained import load_tokenizer

NUM_PROCESSES = 2
LOADERS = """
import multiprocessing
import sys
import psutil
import torch
from agnews_dist.model.gpt2 import load_backbone, split_model
from agnews_dist.model.pretrained import load_tokenizer
from agnews_dist.run.fingerprints import weights_fingerprint

checkpoint, how, num_processes = sys.argv[1], sys.argv[2], int(sys.argv[3])
fork = multiprocessing.get_context("fork")
started, begin, loaded, end = (fork.Barrier(num_processes + 1, timeout=300) for _ in range(4))

def load():
    tokenizer = load_tokenizer(checkpoint, revision=None, pad_token="new")
    started.wait()
    begin.wait()
    backbone = load_backbone(checkpoint, revision=None, init="pretrained", seed=0, tokenizer=tokenizer)
    classifier = split_model(backbone, trainable_blocks=1, num_classes=4, seed=0)
    if how == "copied":
        classifier.prefix._apply(torch.clone)
    weights_fingerprint(classifier.frozen_state)  # reads every frozen weight, as a run does
    loaded.wait()
    end.wait()

def measure():
    # A page that n processes map counts one n-th in each.
    return sum(psutil.Process(loader.pid).memory_full_info().pss for loader in loaders)

loaders = [fork.Process(target=load, daemon=True) for _ in range(num_processes)]
for loader in loaders:
    loader.start()
started.wait()
before = measure()
begin.wait()
loaded.wait()
print(measure() - before)
end.wait()
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
    done = fork_server.run_python("-c", LOADERS, str(checkpoint), how, str(NUM_PROCESSES))
    return int(done.stdout) / size


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells shared pages apart")
def test_checkpoint_is_in_memory_once_per_node(checkpoint: Path) -> None:
    assert growth(checkpoint, "mapped") < 1.4
    assert growth(checkpoint, "copied") > 1.8, "the control: a copy per process is noticed"
