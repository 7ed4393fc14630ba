"""The benchmark of length bucketing: the quick suffix is Hugging Face's, statistics count right, tables are the logs'."""

import importlib
import itertools
import json
import sys

import numpy as np
import pytest
import torch
from support.processes import REPOSITORY
from torch.nn import functional
from transformers import GPT2Config, GPT2ForSequenceClassification

from agnews_dist.config.schema import BatchConfig
from agnews_dist.data.tokens import TokenSplit
from agnews_dist.model.gpt2 import Backbone, split

BENCH = REPOSITORY / "tests" / "bench"
WINDOWS = ("1", "4", "16", "64", "128", "256", "epoch")
CONTROLS = ("shortest first", "one label per batch")


@pytest.fixture(scope="module")
def bucketing():
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module("bucketing")
    sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def batch_mix(bucketing):
    return importlib.import_module("batch_mix")


def test_logits_and_gradients_are_those_of_hugging_face(bucketing):
    generator = torch.Generator().manual_seed(0)
    shape = {"vocab_size": 50, "n_positions": 16, "n_embd": 24, "n_layer": 3, "n_head": 3, "num_labels": 4}
    reference = GPT2ForSequenceClassification(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():
        for weight in reference.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    lengths, labels = [3, 16, 1, 7, 16], np.array([1, 0, 3, 2, 1])
    texts = [torch.randint(0, 50, (length,), generator=generator) for length in lengths]
    tokens = TokenSplit("train", torch.cat(texts).numpy().astype(np.uint16), np.cumsum([0, *lengths]), labels, 0)
    ids_B = np.array([3, 0, 2, 1])

    def copy_of(module):
        twin = type(module)(module.config).eval()
        twin.load_state_dict(module.state_dict())
        return twin

    backbone = Backbone(copy_of(reference.transformer), reference.score.weight.detach().clone(), None)
    classifier = split(backbone, trainable_blocks=1, num_classes=4, seed=0)
    frozen = bucketing.freeze(classifier, tokens)
    model = bucketing.LastTokenSuffix(classifier.suffix)
    logits_BC = model(*frozen.inputs(ids_B))
    batch = frozen.batch(ids_B)
    assert batch.labels_B.tolist() == [2, 1, 3, 0]
    functional.cross_entropy(logits_BC, batch.labels_B).backward()

    hidden = [reference.transformer(texts[i][None]).last_hidden_state[0, -1] for i in ids_B]
    expected_BC = reference.score(torch.stack(hidden))
    functional.cross_entropy(expected_BC, torch.tensor([2, 1, 3, 0])).backward()
    torch.testing.assert_close(logits_BC, expected_BC, rtol=1e-5, atol=1e-5)
    found = {name: weight.grad for name, weight in classifier.suffix.named_parameters() if name != "out_head.bias"}
    wanted = {f"transformer.{name}": grad for name, grad in found.items() if name != "out_head.weight"}
    wanted["score.weight"] = found["out_head.weight"]
    assert len(wanted) == 15
    for name, grad in wanted.items():
        torch.testing.assert_close(grad, reference.get_parameter(name).grad, rtol=1e-4, atol=1e-5)


def test_every_order_has_each_example_once_and_the_controls_are_what_they_are_called(batch_mix):
    rng = np.random.default_rng(0)
    lengths, labels = rng.integers(1, 90, 1000), rng.integers(0, 4, 1000)
    assert (*WINDOWS, *CONTROLS) == batch_mix.ORDERS
    epochs = {order: batch_mix.global_batches(order, lengths, labels, seed=1, epoch=2) for order in batch_mix.ORDERS}
    for batches in epochs.values():
        assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(1000))
        assert sorted(map(len, batches)) == [1000 % 32] + [32] * 31
    assert (np.diff(lengths[np.concatenate(epochs["shortest first"])]) >= 0).all()
    mixed = [len(set(labels[ids])) > 1 for ids in epochs["one label per batch"]]
    assert sum(mixed) <= 3


def test_label_mix_is_one_on_average_over_all_batches_there_are(batch_mix):
    labels = np.array([0, 0, 0, 1, 1, 2, 2])
    drawn = [np.array(ids) for ids in itertools.combinations(range(7), 3)]
    assert batch_mix.label_mix(drawn, labels) == pytest.approx(1.0)
    assert batch_mix.label_mix([np.array([0, 1, 2])], labels) > 1.5


def test_length_between_is_what_analysis_of_variance_says(batch_mix):
    lengths = np.array([10, 20, 30, 40, 50, 90])
    batches = [np.array([0, 5]), np.array([1, 2, 3]), np.array([4])]
    within = sum(((lengths[ids] - lengths[ids].mean()) ** 2).sum() for ids in batches)
    assert batch_mix.length_between(batches, lengths) == pytest.approx(1 - within / (lengths.var() * 6))


def test_pairs_again_counts_pairs(batch_mix):
    rng = np.random.default_rng(0)
    first, second = (np.split(rng.permutation(40), cuts) for cuts in ([10, 20, 33], [5, 25]))
    pairs = [
        {pair for ids in batches for pair in itertools.combinations(sorted(ids), 2)} for batches in (first, second)
    ]
    found, chance = batch_mix.pairs_again(first, second)
    assert found == len(pairs[0] & pairs[1]) / len(pairs[0]) > 0
    assert chance == len(pairs[1]) / (40 * 39 / 2)


def logged(name):
    path = BENCH / "logs" / f"2026-11-22-bucketing-{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def shown_as(order):
    return f"{order} (default)" if order == str(BatchConfig().bucket_window) else order


def cell(values, sign=""):
    return f"{values.mean():{sign}.4f} +- {values.std(ddof=1) / len(values) ** 0.5:.4f}"


def test_the_accuracy_table_is_what_the_log_says():
    rows, results = logged("training"), (BENCH / "RESULTS.md").read_text(encoding="utf-8")
    (checked,) = (row for row in rows if row["what"] == "check")
    assert 0 < checked["largest_loss_difference"] < 1e-5
    found = {order: {} for order in (*WINDOWS, *CONTROLS)}
    for row in (row for row in rows if row["what"] == "train"):
        assert row["seed"] not in found[row["order"]]
        found[row["order"]][row["seed"]] = (row["accuracy"][-1], row["loss"][-1], row["training_loss"])
    for order, by_seed in found.items():
        assert len(by_seed) >= 6
        assert order in CONTROLS or by_seed.keys() == found["1"].keys()
        scores = np.array(list(by_seed.values()))
        gaps = scores - np.array([found["1"][seed] for seed in by_seed])
        cells = [
            shown_as(order),
            str(len(by_seed)),
            cell(scores[:, 0]),
            "" if order == "1" else cell(gaps[:, 0], "+"),
            cell(scores[:, 1]),
            *(("", "") if order == "1" else (cell(gaps[:, 1], "+"), cell(gaps[:, 2], "+"))),
        ]
        assert "| " + " | ".join(cells) + " |" in results
    at = {order: np.array([found[order][seed] for seed in sorted(found["1"])]) for order in WINDOWS}
    reading = " ".join(results.split())
    wide = (at["64"] + at["128"] + at["256"] + at["epoch"]) / 4 - at["1"]
    assert f"the mean of these four windows at {cell(wide[:, 1], '+')}" in reading
    accuracy, loss, training_loss = (cell(gap, "+") for gap in (at["256"] - at["64"]).T)
    assert f"accuracy {accuracy}, loss {loss}, training loss {training_loss}" in reading


def test_the_table_of_mix_and_padding_is_what_the_log_says():
    rows, results = logged("statistics"), (BENCH / "RESULTS.md").read_text(encoding="utf-8")
    assert [row["order"] for row in rows] == [*WINDOWS, *CONTROLS]
    for row in rows:
        cells = [f"{row['label_mix']:.2f}", f"{row['length_between']:.3f}"]
        cells += [f"{100 * row[key]:.2f}" for key in ("pairs_again", "pairs_again_resampled")]
        keys = ("padding", "padding_resampled", "critical_path", "critical_path_resampled")
        cells += [f"{row[key]:.3f}" for key in keys]
        assert "| " + " | ".join([shown_as(row["order"]), *cells]) + " |" in results
