"""Does length bucketing make training worse? The same job with global batches that are more and more alike in length.

    python tests/bench/bucketing.py train LOG [--orders 1 64 epoch ...] [--seeds 0 1 ...]
    python tests/bench/bucketing.py check LOG
    python tests/bench/bucketing.py statistics LOG
    python tests/bench/bucketing.py table LOG

`train` makes three epochs per (order, seed) on the shared real rows with the shared small trained GPT-2 and appends one JSON
line each; what is in the log already is not run again. Orders (batch_mix.py): a `bucket_window`, or a harmful control. Every
order gets the same seeds, that is the same initial head and the same stream of dropout. `check` compares the loop's losses and
gradients with those of the plain prefix and suffix. `statistics` trains nothing: how batches are mixed, what padding is left.

A run takes seconds, because what is frozen is computed once: the last block's input, already normalised, for every token. Of
that block only the last token's output is used, so all but keys and values is computed for one token per example.
"""

import argparse
import copy
import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batch_mix import BATCH, EPOCHS, ORDERS, global_batches, statistics_rows
from torch import Tensor, nn
from torch.nn import functional

from agnews_dist.config.schema import BatchConfig, Config, DataConfig, ModelConfig, RunConfig
from agnews_dist.data.batching.batch import Batch
from agnews_dist.data.batching.loader import EVALUATION_TOKENS
from agnews_dist.data.batching.shares import plan_evaluation
from agnews_dist.data.rows import Ints
from agnews_dist.data.tokens import TokenSplit
from agnews_dist.distributed.world import World
from agnews_dist.evaluation.evaluator import log_softmax_NC
from agnews_dist.evaluation.metrics import Scores, compute_scores, in_file_order
from agnews_dist.events import ignore_event
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.model.suffix import Suffix
from agnews_dist.run.setup import TrainingInputs, load_training_inputs
from agnews_dist.training.losses import example_losses
from agnews_dist.training.optim import build_optimizer, learning_rate, set_lr
from agnews_dist.training.timing import StageTimer

REPOSITORY = Path(__file__).resolve().parents[2]
LR, DECAY, CLIP = 1e-3, 0.01, 1.0


class LastTokenSuffix(nn.Module):
    """The suffix of one block as a function of its normalised input; the same parameters, logits and gradients.

    Per head, `score_t = (q W_k^T) . h_t` (the key's bias falls out of the softmax) and `out = (sum_t a_t h_t) W_v +
    (sum_t a_t) b_v`, where h_t = gain * n_t + shift is the norm's output for the normalised n_t, which is frozen.
    """

    def __init__(self, suffix: Suffix) -> None:
        super().__init__()
        self.suffix = suffix
        (self._block,) = suffix.h.values()

    def forward(self, normed_BTD: Tensor, is_real_BT: Tensor, last_BD: Tensor) -> Tensor:
        """`last_BD`: the block's input at the last real token, not normalised. Returns logits_BC."""
        norm, attention = self._block.ln_1, self._block.attn
        num_rows, width = last_BD.shape
        heads = (-1, attention.num_heads, attention.head_dim)
        query_w, key_w, value_w = attention.c_attn.weight.split(width, dim=1)
        query_b, _, value_b = attention.c_attn.bias.split(width)
        query_BHE = (norm(last_BD) @ query_w + query_b).view(heads)
        probe_BHD = torch.einsum("bhe,dhe->bhd", query_BHE, key_w.view(heads)) * norm.weight
        scores_BHT = probe_BHD @ normed_BTD.transpose(1, 2) * attention.scaling
        weights_BHT = scores_BHT.masked_fill(~is_real_BT[:, None], -math.inf).softmax(dim=-1)
        weights_BHT = attention.attn_dropout(weights_BHT)
        sum_BH1 = weights_BHT.sum(dim=-1, keepdim=True)
        mean_BHD = weights_BHT @ normed_BTD * norm.weight + sum_BH1 * norm.bias
        value_BHE = torch.einsum("bhd,dhe->bhe", mean_BHD, value_w.view(heads)) + sum_BH1 * value_b.view(heads)
        attended_BD = attention.c_proj(value_BHE.reshape(num_rows, width))
        hidden_BD = last_BD + attention.resid_dropout(attended_BD)
        hidden_BD = hidden_BD + self._block.mlp(self._block.ln_2(hidden_BD))
        logits_BC: Tensor = self.suffix.out_head(self.suffix.ln_f(hidden_BD))
        return logits_BC


@dataclass(frozen=True)
class Frozen:
    """A split after the frozen part: all that training reads."""

    lengths_N: Ints
    labels_N: Ints
    begin_N: Tensor
    normed: Tensor
    """The last block's normalised input, the tokens of all texts end to end: shape (tokens, D)."""
    last_ND: Tensor
    """Its input at every text's last token, not normalised."""

    def inputs(self, ids_B: Ints) -> tuple[Tensor, Tensor, Tensor]:
        """What `LastTokenSuffix` takes, right-padded to the longest."""
        ids = torch.from_numpy(ids_B)
        index_BT, is_real_BT = padded(self.begin_N[ids], torch.from_numpy(self.lengths_N[ids_B]))
        return self.normed[index_BT], is_real_BT, self.last_ND[ids]

    def batch(self, ids_B: Ints) -> Batch:
        """Labels and weights for the loss; the tokens are not needed any more."""
        labels_B = torch.from_numpy(self.labels_N[ids_B])
        return Batch(torch.empty(0), torch.empty(0), labels_B, torch.ones(len(ids_B)), torch.from_numpy(ids_B))


def padded(begin_B: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    """Indices into a flat array and which of them are real, both of shape (B, T)."""
    column_T = torch.arange(int(lengths_B.max()))
    is_real_BT = column_T < lengths_B[:, None]
    return torch.where(is_real_BT, begin_B[:, None] + column_T, 0), is_real_BT


def token_batch(tokens: TokenSplit, ids_B: Ints) -> tuple[Tensor, Tensor]:
    """tokens_BT, padded with whatever token is first in the file, and lengths_B."""
    lengths_B = torch.from_numpy(tokens.lengths[ids_B])
    index_BT, _ = padded(torch.from_numpy(tokens.offsets[ids_B]), lengths_B)
    return torch.from_numpy(tokens.tokens[index_BT.numpy()].astype(np.int64)), lengths_B


def freeze(classifier: Classifier, tokens: TokenSplit) -> Frozen:
    """Run the prefix over a split once."""
    (block,) = classifier.suffix.h.values()
    width, eps = classifier.config.n_embd, block.ln_1.eps
    normed, last_ND = torch.empty(len(tokens.tokens), width), torch.empty(len(tokens), width)
    for ids_B in plan_evaluation(tokens.lengths, max_tokens=EVALUATION_TOKENS):
        tokens_BT, lengths_B = token_batch(tokens, ids_B)
        index_BT, is_real_BT = padded(torch.from_numpy(tokens.offsets[ids_B]), lengths_B)
        hidden_BTD = classifier.prefix.float()(tokens_BT)  # a checkpoint may be stored in bf16
        normed[index_BT[is_real_BT]] = functional.layer_norm(hidden_BTD, (width,), eps=eps)[is_real_BT]
        last_ND[torch.from_numpy(ids_B)] = hidden_BTD[torch.arange(len(ids_B)), lengths_B - 1]
    labels_N = np.array(tokens.labels, dtype=np.int64)
    return Frozen(tokens.lengths, labels_N, torch.from_numpy(np.array(tokens.offsets[:-1])), normed, last_ND)


def score(model: LastTokenSuffix, frozen: Frozen) -> Scores:
    """Without dropout, in the micro-batches of the package's scoring."""
    model.eval()
    order = plan_evaluation(frozen.lengths_N, max_tokens=EVALUATION_TOKENS)
    with torch.no_grad():
        logits_NC = torch.cat([model(*frozen.inputs(ids_B)) for ids_B in order]).numpy()
    log_NC = log_softmax_NC(logits_NC[in_file_order(np.concatenate(order), len(frozen.labels_N))])
    loss_sum = -float(log_NC[np.arange(len(log_NC)), frozen.labels_N].sum())
    return compute_scores(frozen.labels_N, log_NC.argmax(axis=1), log_NC.shape[1], loss_sum)


def train(suffix: Suffix, train_split: Frozen, validation: Frozen, *, order: str, seed: int) -> dict[str, Any]:
    """Three epochs; the scores after each."""
    start = time.perf_counter()
    model = LastTokenSuffix(suffix)
    optimizer = build_optimizer(model, lr=LR, weight_decay=DECAY)
    torch.manual_seed(seed)
    scores, step = [], 0
    num_steps = EPOCHS * -(-len(train_split.labels_N) // BATCH)
    for epoch in range(EPOCHS):
        model.train()
        loss_sum = 0.0
        for ids_B in global_batches(order, train_split.lengths_N, train_split.labels_N, seed=seed, epoch=epoch):
            set_lr(optimizer, learning_rate(step, num_steps=num_steps, peak=LR, warmup_ratio=0.0, schedule="linear"))
            optimizer.zero_grad(set_to_none=True)
            loss = example_losses(model(*train_split.inputs(ids_B)), train_split.batch(ids_B)).sum()
            (loss / len(ids_B)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            loss_sum, step = loss_sum + loss.item(), step + 1
        scores.append(score(model, validation))
    assert step == num_steps
    return {
        "what": "train",
        "order": order,
        "seed": seed,
        "accuracy": [found.accuracy for found in scores],
        "loss": [round(found.loss, 6) for found in scores],
        "training_loss": round(loss_sum / len(train_split.labels_N), 6),
        "seconds": round(time.perf_counter() - start, 1),
    }


def check(sources: TrainingInputs, *, order: str, seed: int, num_steps: int) -> dict[str, Any]:
    """The loop beside the plain path, each with its own updates, without dropout: how far do they differ?"""
    tokens, plain = sources.store.splits["train"], sources.classifier
    frozen, quick = freeze(plain, tokens), LastTokenSuffix(copy.deepcopy(plain.suffix))
    optimizers = [build_optimizer(module, lr=LR, weight_decay=DECAY) for module in (plain.suffix, quick)]
    loss_gap = gradient_gap = 0.0
    for ids_B in global_batches(order, frozen.lengths_N, frozen.labels_N, seed=seed, epoch=0)[:num_steps]:
        batch = frozen.batch(ids_B)
        losses = [
            example_losses(plain.logits(*token_batch(tokens, ids_B)), batch).sum() / len(ids_B),
            example_losses(quick(*frozen.inputs(ids_B)), batch).sum() / len(ids_B),
        ]
        gradients = []
        for loss, optimizer, module in zip(losses, optimizers, (plain.suffix, quick), strict=True):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            gradients.append(torch.cat([weight.grad.flatten() for weight in module.parameters()]))
            nn.utils.clip_grad_norm_(module.parameters(), CLIP)
            optimizer.step()
        loss_gap = max(loss_gap, abs(losses[0].item() - losses[1].item()))
        gradient_gap = max(gradient_gap, ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item())
    return {
        "what": "check",
        "order": order,
        "seed": seed,
        "num_steps": num_steps,
        "largest_loss_difference": loss_gap,
        "largest_relative_gradient_difference": gradient_gap,
    }


def open_sources(seed: int) -> TrainingInputs:
    """The shared rows and model; the head is drawn from the seed."""
    shared = Path(os.environ.get("AGNEWS_SHARED", REPOSITORY.parent / "shared"))
    data = DataConfig(source=str(shared / "data" / "ag_news"))
    model = ModelConfig(name=str(shared / "checkpoints" / "gpt2-mini"))
    config = Config(data=data, model=model, run=RunConfig(seed=seed))
    return load_training_inputs(config, World(), ignore_event, StageTimer(time.perf_counter()))


def runs(orders: list[str], seeds: list[int], done: set[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """All orders of a seed before the next seed, so that an interrupted sweep is still paired."""
    sources = open_sources(seeds[0])
    train_split, validation = (freeze(sources.classifier, sources.store.splits[name]) for name in ("train", "validation"))
    for seed in seeds:
        left = [order for order in orders if (order, seed) not in done]
        initial = open_sources(seed).classifier.suffix if left else None
        for order in left:
            yield train(copy.deepcopy(initial), train_split, validation, order=order, seed=seed)


def tables(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The tables of RESULTS.md, line by line: scores after the last epoch, and differences to random batches, seed by seed."""
    trained = [row for row in rows if row["what"] == "train"]
    for row in trained:
        row["accuracy"], row["loss"] = row["accuracy"][-1], row["loss"][-1]
    random = {row["seed"]: row for row in trained if row["order"] == "1"}
    for order in ORDERS if trained else ():
        of_order = [row for row in trained if row["order"] == order]
        cells = [shown_as(order), str(len(of_order))]
        for key in ("accuracy", "loss", "training_loss"):
            gaps = [row[key] - random[row["seed"]][key] for row in of_order]
            cells += [mean_and_error([row[key] for row in of_order])] if key != "training_loss" else []
            cells.append("" if order == "1" else mean_and_error(gaps, "+"))
        yield "| " + " | ".join(cells) + " |"
    for row in rows:
        if row["what"] == "statistics":
            again = [f"{100 * row[key]:.2f}" for key in ("pairs_again", "pairs_again_resampled")]
            keys = ("padding", "padding_resampled", "critical_path", "critical_path_resampled")
            cells = [shown_as(row["order"]), f"{row['label_mix']:.2f}", f"{row['length_between']:.3f}", *again]
            yield "| " + " | ".join([*cells, *(f"{row[key]:.3f}" for key in keys)]) + " |"


def shown_as(order: str) -> str:
    return f"{order} (default)" if order == str(BatchConfig().bucket_window) else order


def mean_and_error(values: list[float], sign: str = "") -> str:
    """`mean +- standard error`."""
    return f"{statistics.mean(values):{sign}.4f} +- {statistics.stdev(values) / len(values) ** 0.5:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "check", "statistics", "table"])
    parser.add_argument("log", type=Path)
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(6)))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logged = [json.loads(line) for line in args.log.read_text(encoding="utf-8").splitlines()] if args.log.exists() else []
    if args.what == "table":
        print("\n".join(tables(logged)))
        return
    found: Iterable[dict[str, Any]]
    if args.what == "train":
        found = runs(args.orders, args.seeds, {(row["order"], row["seed"]) for row in logged if row["what"] == "train"})
    elif args.what == "check":
        found = [check(open_sources(args.seeds[0]), order=args.orders[0], seed=args.seeds[0], num_steps=20)]
    else:
        tokens = open_sources(0).store.splits["train"]
        found = statistics_rows(tokens.lengths, np.array(tokens.labels))
    for row in found:
        print(json.dumps(row), flush=True)
        with args.log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
