"""Worker of test_sampler_loop.py: runs the training loop of the batch sampler's docstring unchanged."""

import importlib
import inspect
import os
import sys
import textwrap
from itertools import count
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from safetensors.torch import save_file

from agnews_dist.data.batching import LengthBucketedBatchSampler, PlanSettings

NUM_EXAMPLES, NUM_CLASSES, NUM_EPOCHS, LEARNING_RATE = 21, 3, 2, 0.5
MAX_TOKENS_PER_RANK = 24
# The last batch of an epoch holds one example, so all other ranks have none.
SETTINGS = PlanSettings(global_batch_size=5, bucket_window=2, seed=3)


class BagOfTokens(torch.nn.Module):
    """Classifier of the mean embedding of the real tokens, in fp64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = torch.nn.Embedding(30, 6, dtype=torch.float64)
        self.head = torch.nn.Linear(6, NUM_CLASSES, dtype=torch.float64)

    def forward(self, tokens_BT: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        is_real_BT = torch.arange(tokens_BT.shape[1]) < lengths_B[:, None]
        sums_BD = (self.embedding(tokens_BT) * is_real_BT[..., None]).sum(dim=1)
        return self.head(torch.tanh(sums_BD / lengths_B[:, None]))


def make_examples() -> list[tuple[torch.Tensor, int]]:
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, 20, NUM_EXAMPLES).tolist()
    return [(torch.from_numpy(rng.integers(1, 30, length)), int(rng.integers(NUM_CLASSES))) for length in lengths]


def import_documented_loop(directory: Path, name: str, change: tuple[str, str] | None = None) -> ModuleType:
    """Import the indented code of the docstring from a file; `change`: (old, new) text."""
    _, _, below = inspect.getdoc(LengthBucketedBatchSampler).partition("::\n\n")
    lines = below.splitlines()
    end = next(number for number, line in enumerate(lines) if line and not line.startswith("    "))
    code = textwrap.dedent("\n".join(lines[:end]))
    if change is not None:
        assert code.count(change[0]) == 1, change[0]
        code = code.replace(*change)
    (directory / f"{name}.py").write_text(code, encoding="utf-8")
    return importlib.import_module(name)


class KilledError(Exception):
    """Simulated kill of a run."""


def main() -> None:
    output, rank, num_ranks = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo")
    own = output / f"rank{rank}"
    own.mkdir()
    sys.path.insert(0, str(own))
    dataset = make_examples()
    lengths = [len(tokens) for tokens, _ in dataset]

    def run(loop: ModuleType, name: str, start: dict | None = None, stop: int | None = None) -> dict:
        """Train and write the first gradient and last weights; `stop`: number of steps before a simulated kill."""
        model = BagOfTokens()
        sampler = LengthBucketedBatchSampler(
            lengths, num_ranks=num_ranks, rank=rank, settings=SETTINGS, max_tokens_per_rank=MAX_TOKENS_PER_RANK
        )
        if start is not None:
            model.load_state_dict(start["weights"])
            sampler.load_state_dict(start["position"])
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        gradients: list[dict[str, torch.Tensor]] = []
        optimizer.register_step_pre_hook(
            lambda *_: gradients.append({key: value.grad.clone() for key, value in model.named_parameters()})
        )
        numbers, last = count(1), {}

        def save(position: dict) -> None:
            last.update(position=position, weights={key: value.clone() for key, value in model.state_dict().items()})
            if next(numbers) == stop:
                raise KilledError

        try:
            loop.train(model, optimizer, dataset, sampler, NUM_EPOCHS, save)
        except KilledError:
            return last
        assert len(gradients) == next(numbers) - 1
        save_file(gradients[0], output / f"{name}-gradient-rank{rank}of{num_ranks}.safetensors")
        save_file(last["weights"], output / f"{name}-weights-rank{rank}of{num_ranks}.safetensors")
        return last

    loop = import_documented_loop(own, "documented")
    run(loop, "documented")
    run(loop, "resumed", start=run(loop, "killed", stop=3))
    # The usual loss: mean over the examples of a micro-batch, averaged over ranks by DDP, here also over micro-batches.
    scale = "num_ranks / micro.num_examples if micro.ids else 0.0"
    run(import_documented_loop(own, "mean_of_means", (scale, "1 / max(1, len(micro.ids))")), "mean_of_means")


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
