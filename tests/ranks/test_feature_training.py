"""Trainings with features in every place, on one, two and three ranks, against Hugging Face's model in one plain loop.

The key's third of `c_attn.bias` is not compared. No score depends on it, so its true gradient is zero, and AdamW scales the
rounding error up to full steps.
"""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import fork_server
from support.processes import REPOSITORY
from support.toy import (
    our_name,
    reference_gradients,
    toy_reference_groups,
    toy_reference_logits,
    toy_reference_model,
    toy_split,
)

from agnews_dist.data.batching.epoch_plan import plan
from agnews_dist.data.batching.settings import PlanSettings

RNG = np.random.default_rng(7)
LENGTHS = {name: RNG.integers(1, 31, size).tolist() for name, size in (("train", 64), ("validation", 33), ("test", 21))}
# 64 = 9 x 7 + 1: one batch leaves ranks without a row. Some steps take several micro-batches.
SETTINGS = {"global_batch_size": 7, "bucket_window": 3, "seed": 5}
EPOCHS, LR, DECAY = 3, 0.01, 0.05
RANKS = (1, 2, 3)
PLACES = ("off", "host", "device", "disk")
BLOCKS = (0, 1, 2)


EARLIER = 50
"""Training texts of the earlier run of the cases whose corpus has grown."""


def case(requested: str, trainable_blocks: int | str, name: str = "", *, fast_path: bool = True, earlier: int = 0) -> dict:
    name = name or f"{requested}-{trainable_blocks}"
    facts = {"fast_path": fast_path, "earlier": earlier, "cache": "-grown" * (earlier > 0)}
    return {"name": name, "requested": requested, "trainable_blocks": trainable_blocks, **facts}


CASES = [
    *(case(requested, blocks) for blocks in BLOCKS for requested in PLACES),
    case("disk", 1, "again"),
    # In this order: the last one adds to the disk.
    case("host", 1, "grown-host", earlier=EARLIER),
    case("device", 1, "grown-device", earlier=EARLIER),
    case("disk", 1, "grown", earlier=EARLIER),
    case("device", "all"),
    case("off", 1, "plain", fast_path=False),
]
NAMED = {each["name"]: each for each in CASES}


def names_of(num_ranks: int) -> list[str]:
    """Return all cases for one rank; for several ranks, those that differ from one rank."""
    excluded = {"off-0", "host-0", "disk-0", "off-2", "plain", "device-all"} if num_ranks > 1 else set()
    return [name for name in NAMED if name not in excluded]


RUNS = [(num_ranks, name) for num_ranks in RANKS for name in names_of(num_ranks)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("features")
    sizes = {"max_tokens_per_rank": 45, "call_tokens": 64, "evaluation_tokens": 90}
    arguments = {"lengths": LENGTHS, "settings": SETTINGS, "epochs": EPOCHS, "lr": LR, "weight_decay": DECAY}
    cases = {num_ranks: [NAMED[name] for name in names_of(num_ranks)] for num_ranks in RANKS}
    (directory / "arguments.json").write_text(json.dumps(arguments | sizes | {"cases": cases}), encoding="utf-8")
    worker = REPOSITORY / "tests" / "ranks" / "feature_training_worker.py"
    for num_ranks in RANKS:
        fork_server.run_ranks(num_ranks, str(worker), str(directory), str(directory / "arguments.json"))
    return directory


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread, as the ranks do. With a model this small, two threads mostly wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def facts(saved: Path, name: str, num_ranks: int, rank: int = 0) -> dict:
    return json.loads((saved / f"{name}-rank{rank}of{num_ranks}.json").read_text(encoding="utf-8"))


def tensors(saved: Path, name: str, num_ranks: int, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(saved / f"{name}-rank{rank}of{num_ranks}.safetensors")


def weights(saved: Path, name: str, num_ranks: int, rank: int = 0) -> dict[str, torch.Tensor]:
    found = tensors(saved, name, num_ranks, rank)
    return {key: value for key, value in found.items() if not key.startswith("logits.")}


def global_batches() -> list[list[int]]:
    lengths_N = np.array(LENGTHS["train"])
    epochs = [plan(lengths_N, PlanSettings(**SETTINGS), epoch=epoch).global_batches() for epoch in range(EPOCHS)]
    return [ids.tolist() for epoch in epochs for ids in epoch]


def train_reference(trainable_blocks: int | str, batches: list[list[int]]) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train Hugging Face's classifier with attention mask, whole global batches, mean loss, clipping at 1 and AdamW."""
    model, tokens_NT, mask_NT = toy_reference_model(LENGTHS["train"], trainable_blocks)
    labels_N = torch.from_numpy(toy_split(LENGTHS["train"]).labels)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer, losses = torch.optim.AdamW(toy_reference_groups(trained, DECAY, {}), lr=LR), []
    for ids in batches:
        logits_BC = model(input_ids=tokens_NT[ids], attention_mask=mask_NT[ids]).logits
        loss = torch.nn.functional.cross_entropy(logits_BC, labels_N[ids])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return {our_name(name): value.detach() for name, value in trained.items()}, losses


def key_third(name: str, weight: torch.Tensor) -> slice | None:
    """Return the entries of a parameter that are the key's bias; None if there are none."""
    third = len(weight) // 3
    return slice(third, 2 * third) if name.endswith("attn.c_attn.bias") else None


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of a weight, without the key's bias."""
    assert found.keys() == expected.keys()
    differences = {name: (found[name] - expected[name]).abs() for name in expected}
    for name, difference in differences.items():
        if keys := key_third(name, difference):
            difference[keys] = 0
    return max(float(difference.max()) for difference in differences.values())


@pytest.mark.parametrize("trainable_blocks", [*BLOCKS, "all"])
def test_training_on_cached_features_ends_at_the_reference_weights(saved, trainable_blocks):
    batches = global_batches()
    expected, losses = train_reference(trainable_blocks, batches)
    assert len(losses) == 30
    for num_ranks, name in RUNS:
        if NAMED[name]["trainable_blocks"] == trainable_blocks:
            for rank in range(num_ranks):
                assert distance(weights(saved, name, num_ranks, rank), expected) < 2e-5, (name, num_ranks, rank)
                assert facts(saved, name, num_ranks, rank)["losses"] == pytest.approx(losses, abs=3e-5)
    # Controls: training changes the weights far more, and so does another order of the batches.
    untrained, _ = train_reference(trainable_blocks, [])
    assert distance(untrained, expected) > 0.1
    swapped, _ = train_reference(trainable_blocks, [*batches[1:], batches[0]])
    assert distance(swapped, expected) > 0.01


def test_excluded_key_bias_has_no_gradient_beyond_rounding(saved):
    """In fp64 it is tiny, and AdamW still changes the bias; on the fast path it is exactly zero."""
    name = "h.2.attn.c_attn.bias"
    true = reference_gradients(LENGTHS["train"])[name]
    keys = key_third(name, true)
    assert keys is not None
    assert float(true[keys].abs().max()) < 1e-15
    assert float(true[: keys.start].abs().max()) > 1e-4
    start, _ = train_reference(1, [])
    reference, _ = train_reference(1, global_batches())
    assert float((reference[name] - start[name])[keys].abs().max()) > 1e-4
    assert torch.equal(weights(saved, "host-1", 2)[name][keys], start[name][keys])


@pytest.mark.parametrize(("num_ranks", "name"), RUNS)
def test_logits_are_the_same_bits_for_every_place(saved, name, num_ranks):
    """Compare the logits of the untrained weights with those of one rank without a cache."""
    blocks = NAMED[name]["trainable_blocks"]
    baseline = "device-all" if blocks == "all" else f"off-{blocks}"
    for split in ("validation", "test"):
        expected = tensors(saved, baseline, 1)[f"logits.{split}"]
        for rank in range(num_ranks):
            found = tensors(saved, name, num_ranks, rank)[f"logits.{split}"]
            if NAMED[name]["fast_path"]:
                assert torch.equal(found, expected)
            else:
                # Control: another order of the sums changes the last bits only.
                assert not torch.equal(found, expected)
                assert float((found - expected).abs().max()) < 1e-5


def test_logits_equal_the_reference(saved):
    for split in ("validation", "test"):
        reference = toy_reference_logits(LENGTHS[split])
        for name in ("off-0", "off-1", "off-2", "device-all", "plain"):
            assert float((tensors(saved, name, 1)[f"logits.{split}"] - reference).abs().max()) < 1e-5
        assert float(reference.std()) > 0.1


@pytest.mark.parametrize(("num_ranks", "name"), RUNS)
def test_global_batches_and_micro_batches_for_every_place(saved, name, num_ranks):
    found = facts(saved, name, num_ranks)
    of_ranks = [facts(saved, name, num_ranks, rank)["seen"] for rank in range(num_ranks)]
    seen = list(zip(*of_ranks, strict=True))  # seen[step][rank][micro-batch]: ids
    assert [sorted(row for rank in step for micro in rank for row in micro) for step in seen] == [
        sorted(ids) for ids in global_batches()
    ]
    assert all(len({len(rank) for rank in step}) == 1 for step in seen)
    assert len({len(step[0]) for step in seen}) > 1, "some steps have one micro-batch and some have several"
    ranks_of: dict[int, set[int]] = {}
    for step in seen:
        for rank, micros in enumerate(step):
            for row in (row for micro in micros for row in micro):
                ranks_of.setdefault(row, set()).add(rank)
    is_sharded = all(len(ranks) == 1 for ranks in ranks_of.values())
    # With features in device memories, each text stays on one rank.
    assert is_sharded == (num_ranks == 1 or found["place"] == "device")


def distinct_texts(name: str, begin: int = 0) -> set[bytes]:
    rows = toy_split(LENGTHS[name])
    return {rows.tokens[start:end].tobytes() for start, end in list(pairwise(rows.offsets))[begin:]}


def count_distinct(*texts: set[bytes]) -> int:
    return sum(len(text) // 2 for text in set[bytes]().union(*texts))


@pytest.mark.parametrize("num_ranks", RANKS)
def test_each_distinct_text_is_computed_once_by_one_rank(saved, num_ranks):
    evaluated = distinct_texts("validation") | distinct_texts("test")
    for name in names_of(num_ranks):
        found, place, blocks = facts(saved, name, num_ranks), NAMED[name]["requested"], NAMED[name]["trainable_blocks"]
        if blocks == "all":
            assert (found["place"], found["reason"]) == ("off", "only the embeddings are frozen")
        elif name == "plain":
            assert (found["place"], found["reason"]) == ("off", "the plain path computes features at every use")
        elif name == "again":
            assert found["place"] == "disk"
            assert found["reason"].endswith("cached by an earlier run")
        else:
            assert found["place"] == place
            assert "as requested" in found["reason"]
            assert ("% cached by earlier runs" in found["reason"]) == name.startswith("grown")
        if found["place"] == "off" or name == "again":
            expected = 0
        elif name.startswith("grown"):
            known = evaluated | (distinct_texts("train") - distinct_texts("train", EARLIER))
            expected = count_distinct(distinct_texts("train", EARLIER) - known)
        else:
            # The test split is evaluated once, so only files of it have a later use.
            splits = ("train", "validation", "test") if place == "disk" else ("train", "validation")
            expected = count_distinct(*map(distinct_texts, splits))
        total = sum(found["computed"])
        # Ranks with features in their own memories compute a text for each rank that has a row of it.
        is_sharded = place == "device" and num_ranks > 1
        assert expected <= total <= (1.05 if is_sharded else 1) * expected, name
        assert num_ranks == 1 or expected < 1000 or max(found["computed"]) < total, "all ranks take part"
        assert found["warnings"] == []


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("place", ["host", "device", "disk"])
def test_training_on_a_grown_corpus_ends_at_the_weights_of_an_empty_cache(saved, place, num_ranks):
    name = "grown" if place == "disk" else f"grown-{place}"
    for rank in range(num_ranks):
        found, expected = weights(saved, name, num_ranks, rank), weights(saved, f"{place}-1", num_ranks, rank)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert found.keys() == expected.keys()
    assert facts(saved, name, num_ranks)["losses"] == facts(saved, f"{place}-1", num_ranks)["losses"]
    # Control: other features end elsewhere.
    assert not torch.equal(*(weights(saved, each, num_ranks)["out_head.weight"] for each in (name, "device-0")))


def test_features_in_shared_memory_leave_no_name_behind(saved):
    """Ranks of a node share memory through files, whose names are removed once all have mapped them."""
    assert facts(saved, "host-1", 3)["place"] == "host"
    root = Path("/dev/shm") / f"agnews_dist-{Path('/proc/self').stat().st_uid}"
    names = [path.name for path in root.glob("*/*")]
    cached = {path.name for path in saved.glob("cache-of-*/*")}
    assert len(cached) >= 3
    assert not cached & set(names)
