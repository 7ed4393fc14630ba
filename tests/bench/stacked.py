"""The step of members of a sweep: products with a member axis against one member after the other.

    python tests/bench/stacked.py --output DIR [--threads 2] [--rounds 5]

Forward and backward pass of the last block, final norm and head, for 32 texts of 20 to 60 tokens, fp32, with dropout. Both ways
run in turns in one process. `equal bits`: of the gradients, in this one step. The package stacks no members; RESULTS.md has the
reasons.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import GPT2Config, GPT2Model

from agnews_dist.model import last_token
from agnews_dist.model.packed import fuse_activation
from agnews_dist.model.suffix import Suffix

SHAPES = {"GPT-2 small": (768, 12), "width 192": (192, 6)}
NUM_TEXTS, NUM_CLASSES, STEPS = 32, 4, 5


PRODUCTS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
"""Layers of a block whose weights are stacked: nearly all of its parameters."""


class StackedBlocks:
    """The last blocks of several suffixes of one shape."""

    def __init__(self, suffixes: Sequence[Suffix]) -> None:
        """Move the weights of the products into tensors for all; the parameters become views of them."""
        self._blocks: list[Any] = [next(iter(suffix.h.values())) for suffix in suffixes]
        self._parameters = {name: [block.get_parameter(f"{name}.weight") for block in self._blocks] for name in PRODUCTS}
        self._weights: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        for name, parameters in self._parameters.items():
            weights_MIO = torch.stack([parameter.detach() for parameter in parameters])
            for parameter, weight_IO in zip(parameters, weights_MIO, strict=True):
                parameter.data = weight_IO
            self._weights[name], self._gradients[name] = weights_MIO, torch.zeros_like(weights_MIO)

    def __call__(self, features: Sequence[tuple[Tensor, Tensor]], keys: Sequence[Tensor]) -> list[Tensor]:
        """Run each block for the last real token of its texts: last_BD of each member, with autograd.

        `features`: hidden_BTD and lengths_B of each member; B is the same for all. `keys`: their keys_B of dropout. Call
        `hand_out_gradients` after the backward pass.
        """
        blocks, attention = self._blocks, self._blocks[0].attn
        num_members, width = len(blocks), attention.embed_dim
        heads = (num_members, width, attention.num_heads, attention.head_dim)
        lasts = [last_token.select_last_rows(*each) for each in features]
        biases = [block.attn.c_attn.bias.chunk(3) for block in blocks]
        parts = zip(*(self._of("attn.c_attn")[i].split(width, dim=2) for i in range(2)), strict=True)
        (query_w, query_g), (key_w, key_g), (value_w, value_g) = parts

        queries = self._multiply([block.ln_1(last) for block, last in zip(blocks, lasts, strict=True)], query_w, query_g)
        queries = [(query + bias[0]).view(-1, *heads[2:]).transpose(0, 1) for query, bias in zip(queries, biases, strict=True)]
        # Per head: M x H matrices of E x D.
        probes = self._multiply(queries, key_w.view(heads).permute(0, 2, 3, 1), key_g.view(heads).permute(0, 2, 3, 1))
        attended = [
            last_token._attend(block, probe_HBD.transpose(0, 1) * block.ln_1.weight, *each, keys_B)
            for block, probe_HBD, each, keys_B in zip(blocks, probes, features, keys, strict=True)
        ]
        values = self._multiply(
            [mean_BHD.transpose(0, 1) for mean_BHD, _ in attended],
            value_w.view(heads).permute(0, 2, 1, 3),
            value_g.view(heads).permute(0, 2, 1, 3),
        )
        outs = [
            (value_HBE.transpose(0, 1) + sum_BH1 * bias[2].view(heads[2:])).reshape(-1, width)
            for value_HBE, (_, sum_BH1), bias in zip(values, attended, biases, strict=True)
        ]
        outs = self._project(outs, "attn.c_proj")
        lasts = [
            last + last_token._apply_module_dropout(block.attn.resid_dropout, out, keys_B, last_token.ATTENTION_OUTPUT)
            for block, last, out, keys_B in zip(blocks, lasts, outs, keys, strict=True)
        ]
        inner = self._project([block.ln_2(last) for block, last in zip(blocks, lasts, strict=True)], "mlp.c_fc")
        inner = [fuse_activation(block.mlp.act)(each) for block, each in zip(blocks, inner, strict=True)]
        return [
            last + last_token._apply_module_dropout(block.mlp.dropout, out, keys_B, last_token.MLP_OUTPUT)
            for block, last, out, keys_B in zip(blocks, lasts, self._project(inner, "mlp.c_proj"), keys, strict=True)
        ]

    def hand_out_gradients(self) -> None:
        """Set the gradients of the stacked weights after a backward pass."""
        for name, parameters in self._parameters.items():
            for parameter, gradient_IO in zip(parameters, self._gradients[name], strict=True):
                parameter.grad = gradient_IO

    def _of(self, name: str) -> tuple[Tensor, Tensor]:
        return self._weights[name], self._gradients[name]

    def _project(self, inputs: Sequence[Tensor], name: str) -> list[Tensor]:
        outputs = self._multiply(inputs, *self._of(name))
        return [output + block.get_parameter(f"{name}.bias") for output, block in zip(outputs, self._blocks, strict=True)]

    def _multiply(self, inputs: Sequence[Tensor], weights: Tensor, gradients: Tensor) -> Sequence[Tensor]:
        """Multiply the input of each member by its weight. The backward pass writes the weights' gradients."""
        return cast(Sequence[Tensor], _StackedProduct.apply(weights, gradients, *inputs))


class _StackedProduct(torch.autograd.Function):
    """Products of each member's input with its weight. The gradients of the weights go to a tensor of the caller."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, gradients: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        stacked = torch.stack(inputs)
        ctx.save_for_backward(stacked)
        ctx.weights, ctx.gradients = weights, gradients
        return torch.matmul(stacked, weights).unbind()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *of_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (stacked,) = ctx.saved_tensors
        of_stacked = torch.stack(of_outputs)
        if ctx.gradients.is_contiguous():
            torch.bmm(stacked.transpose(-2, -1), of_stacked, out=ctx.gradients)
        else:
            ctx.gradients.copy_(torch.matmul(stacked.transpose(-2, -1), of_stacked))
        return None, None, *torch.matmul(of_stacked, ctx.weights.transpose(-2, -1)).unbind()


def build_suffix(width: int, heads: int, seed: int) -> Suffix:
    torch.manual_seed(seed)
    model = GPT2Model(GPT2Config(n_embd=width, n_head=heads, n_layer=1, vocab_size=8))
    return Suffix({0: model.h[0]}, model.ln_f, nn.Linear(width, NUM_CLASSES)).train()


class Comparison:
    """Members of one shape, and the two ways to compute their gradients."""

    def __init__(self, width: int, heads: int, num_members: int) -> None:
        self._suffixes = [build_suffix(width, heads, seed) for seed in range(num_members)]
        self._stack = StackedBlocks(self._suffixes)
        torch.manual_seed(0)
        self._features = torch.randn(NUM_TEXTS, 60, width), torch.randint(20, 61, (NUM_TEXTS,))
        self._labels_B = torch.randint(NUM_CLASSES, (NUM_TEXTS,))
        self._keys = [torch.arange(NUM_TEXTS) + 1000 * number for number in range(num_members)]

    def one_by_one(self) -> None:
        for suffix, keys_B in zip(self._suffixes, self._keys, strict=True):
            nn.functional.cross_entropy(suffix(*self._features, keys_B), self._labels_B).backward()

    def stacked(self) -> None:
        rows = self._stack([self._features] * len(self._suffixes), self._keys)
        logits = [suffix.out_head(suffix.ln_f(row_BD)) for suffix, row_BD in zip(self._suffixes, rows, strict=True)]
        torch.stack([nn.functional.cross_entropy(each, self._labels_B) for each in logits]).sum().backward()
        self._stack.hand_out_gradients()

    def gradients(self) -> list[Tensor]:
        """Return copies of the gradients, and clear them."""
        found = [weight.grad.clone() for suffix in self._suffixes for weight in suffix.parameters() if weight.grad is not None]
        for suffix in self._suffixes:
            suffix.zero_grad(set_to_none=True)
        return found

    def milliseconds(self, name: str) -> float:
        """Return the time per member and step."""
        begin = time.perf_counter()
        for _ in range(STEPS):
            getattr(self, name)()
            for suffix in self._suffixes:
                suffix.zero_grad(set_to_none=True)
        return 1000 * (time.perf_counter() - begin) / STEPS / len(self._suffixes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    print("| shape | members | one by one, ms | stacked, ms | ratio | equal bits |\n|---|---|---|---|---|---|")
    for name, (width, heads) in SHAPES.items():
        for num_members in (2, 4, 8):
            comparison = Comparison(width, heads, num_members)
            comparison.one_by_one()
            alone = comparison.gradients()
            comparison.stacked()
            is_equal = all(map(torch.equal, alone, comparison.gradients()))
            times = {way: [0.0] * options.rounds for way in ("one_by_one", "stacked")}
            for number in range(options.rounds):
                for way, values in times.items():
                    values[number] = comparison.milliseconds(way)
            one, many = (statistics.median(values) for values in times.values())
            print(f"| {name} | {num_members} | {one:.2f} | {many:.2f} | {one / many:.2f} | {is_equal} |", flush=True)
            row = {"shape": name, "members": num_members, "threads": options.threads, "equal_bits": is_equal, **times}
            with (options.output / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "load": os.getloadavg()[0], "torch": torch.__version__}) + "\n")


if __name__ == "__main__":
    main()
