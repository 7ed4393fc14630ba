"""Every engine trains the same weights as Hugging Face's module in one process, on 1, 2 and 3 ranks.

Cases: DDP, FSDP2, ZeRO 1, 2, 3 with and without offloading; with and without accumulation; one, two or all blocks trainable.
Each makes 12 updates. One launch per number of ranks runs all of them, and checks what an engine refuses, restores and keeps.
"""

import itertools
import json
import math
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import fork_server
from support.processes import REPOSITORY
from support.toy import CLASS_WEIGHTS, CLASSES, our_name, toy_reference_groups, toy_reference_model, toy_split

from agnews_dist.data.batching.epoch_plan import plan
from agnews_dist.data.batching.settings import PlanSettings
from agnews_dist.data.rows import Ints
from agnews_dist.engine.engine import choose_bucket_megabytes

RANKS = (1, 2, 3)
# Unequal shares. 29 = 3 batches of 9 and one of 2, so that one of three ranks has no example in it.
LENGTHS = [30, 30, 28, 28, 27, 26, 25, 25, 24, 20, 20, 18, 17, 16, 12, 9, 8, 7, 7, 5, 5, 4, 3, 3, 2, 1, 1, 1, 1]
EVALUATION_LENGTHS = [30, 22, 17, 12, 9, 9, 7, 5, 3, 2, 1]
NUM_STEPS, LR, WEIGHT_DECAY, BATCH = 12, 1e-3, 0.1, 9
LAYER_DECAY = 0.5
"""Layer decay of the cases that train all blocks."""
TOLERANCE = 2e-5
BROKEN = "AGNEWS_MUTANT" in os.environ
ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
OFFLOADING = ("zero2-offload", "zero3-offload")
# Token limits of a micro-batch: one for all, or about two for the largest share.
WHOLE, PARTS = 10_000, 60


def cases() -> list[dict]:
    made = [
        {"engine": engine, "trainable_blocks": blocks, "max_tokens": tokens, "max_grad_norm": 1.0, "sgd": False}
        for engine, (blocks, tokens) in itertools.product(ENGINES, ((1, WHOLE), (1, PARTS), (2, PARTS), ("all", PARTS)))
    ]
    made += [
        {"engine": engine, "trainable_blocks": 2, "max_tokens": PARTS, "max_grad_norm": 1.0, "sgd": False}
        for engine in OFFLOADING
    ]
    made += [
        {"engine": engine, "trainable_blocks": 2, "max_tokens": PARTS, "max_grad_norm": 0.0, "sgd": True} for engine in ENGINES
    ]
    recipes = (("all", {"train_embeddings": True}), (1, {"pooling": "mean"}), (0, {"pooling": "mean"}))
    plain = {"max_tokens": PARTS, "max_grad_norm": 0.5, "sgd": False}
    made += [
        {"engine": engine, "trainable_blocks": blocks, "options": options, **plain}
        for engine, (blocks, options) in itertools.product(("ddp", "fsdp", "zero2", "zero3"), recipes)
    ]
    for case in made:
        options = case.setdefault("options", {})
        kind = "-".join(options) or ("sgd" if case["sgd"] else "adamw")
        case["name"] = f"{case['engine']}-{case['trainable_blocks']}-{case['max_tokens']}-{kind}"
        case["mean_of_means"] = False
        case["layer_decay"] = LAYER_DECAY if case["trainable_blocks"] == "all" else 1.0
    # With a mutant the case of its test is enough.
    return [case for case in made if not BROKEN or case["name"] in os.environ["AGNEWS_MUTANT"]]


CASES = {case["name"]: case for case in cases()}


def cases_of(num_ranks: int) -> dict[str, dict]:
    """Select all cases on two ranks, otherwise those of two blocks with AdamW."""
    if num_ranks == 2:
        return CASES
    return {name: case for name, case in CASES.items() if case["trainable_blocks"] == 2 and not case["sgd"]} | (
        {name: case for name, case in CASES.items() if case["engine"] == "ddp" and case["options"]} if num_ranks == 1 else {}
    )


EVERYWHERE = [(num_ranks, name) for num_ranks in RANKS for name in cases_of(num_ranks)]
# Each rank's own mean, averaged over the ranks. The negative control.
MEANS_OF_MEANS = [
    case | {"name": f"{case['engine']}-mean-of-means", "mean_of_means": True}
    for name, case in CASES.items()
    if name in (f"ddp-1-{WHOLE}-adamw", f"zero2-1-{WHOLE}-adamw")
]


@pytest.fixture(scope="module")
def launch(tmp_path_factory) -> Callable[[int], Path]:
    """Directory of the files that a number of ranks saved. They run once."""

    @cache
    def launched(num_ranks: int) -> Path:
        directory, extensions = (tmp_path_factory.mktemp(f"{name}{num_ranks}") for name in ("ranks", "extensions"))
        settings = {
            "lengths": LENGTHS,
            "evaluation_lengths": EVALUATION_LENGTHS,
            "global_batch_size": BATCH,
            "num_steps": NUM_STEPS,
            "lr": LR,
            "weight_decay": WEIGHT_DECAY,
            "cases": [*cases_of(num_ranks).values(), *MEANS_OF_MEANS],
            "checked": ["zero3"] if BROKEN else {1: ["zero3"], 2: [*ENGINES, *OFFLOADING], 3: ["zero3", "fsdp"]}[num_ranks],
            "precisions": num_ranks == 2 and not BROKEN,
            "reductions": num_ranks == 2,
        }
        path = directory / "settings.json"
        path.write_text(json.dumps(settings))
        worker = REPOSITORY / "tests" / "ranks" / "engine_worker.py"
        fork_server.run_ranks(num_ranks, str(worker), str(directory), str(path), TORCH_EXTENSIONS_DIR=str(extensions))
        return directory

    return launched


@pytest.fixture(params=RANKS)
def saved(request, launch) -> tuple[int, Path]:
    return request.param, launch(request.param)


def global_batches() -> list[Ints]:
    """List the texts of the first global batches, from the plan alone."""
    settings = PlanSettings(global_batch_size=BATCH)
    epochs = (plan(np.array(LENGTHS), settings, epoch=epoch).global_batches() for epoch in range(9))
    return list(itertools.islice(itertools.chain.from_iterable(epochs), NUM_STEPS))


def reference_training(
    trainable_blocks: int | str,
    *,
    options: dict | None = None,
    sgd: bool = False,
    max_grad_norm: float = 1.0,
    weight_decay: float = WEIGHT_DECAY,
    batches: list[Ints] | None = None,
) -> dict:
    """Train Hugging Face's module with torch's optimizer in one process, without code of this package."""
    num_blocks = 3 if trainable_blocks == "all" else int(trainable_blocks)
    model, tokens_NT, mask_NT = toy_reference_model(LENGTHS, num_blocks, torch.float32, **(options or {}))
    labels_N = torch.from_numpy(toy_split(LENGTHS).labels)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    rates = {f"transformer.h.{block}.": LR * LAYER_DECAY ** (3 - block) for block in range(3)} if num_blocks == 3 else {}
    rates |= {f"transformer.{name}.": LR * LAYER_DECAY**4 for name in ("wte", "wpe")}
    groups = toy_reference_groups(trained, weight_decay, rates)
    optimizer = torch.optim.SGD(trained.values(), lr=LR) if sgd else torch.optim.AdamW(groups, lr=LR)
    losses, norms = [], []
    for ids in global_batches() if batches is None else batches:
        optimizer.zero_grad()
        logits_BC = model(input_ids=tokens_NT[ids], attention_mask=mask_NT[ids]).logits
        whole_loss = {"weight": torch.tensor(CLASS_WEIGHTS), "label_smoothing": 0.1} if sgd else {}
        loss = torch.nn.functional.cross_entropy(logits_BC, labels_N[ids], **whole_loss)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), max_grad_norm or math.inf)))
        losses.append(loss.item())
        optimizer.step()
    weights = {our_name(name): weight.detach() for name, weight in trained.items()}
    evaluated, ids_NT, mask = toy_reference_model(EVALUATION_LENGTHS, num_blocks, torch.float32, **(options or {}))
    evaluated.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits_NC = evaluated(input_ids=ids_NT, attention_mask=mask).logits
    labels_N, predictions_N = torch.from_numpy(toy_split(EVALUATION_LENGTHS).labels), logits_NC.argmax(dim=1)
    confusion = np.zeros((CLASSES, CLASSES), int)
    np.add.at(confusion, (labels_N.numpy(), predictions_N.numpy()), 1)
    return {
        "losses": losses,
        "norms": norms,
        "weights": weights,
        "predictions": predictions_N.tolist(),
        "confusion": confusion.tolist(),
        "loss": torch.nn.functional.cross_entropy(logits_NC, labels_N).item(),
    }


@pytest.fixture(scope="module")
def references() -> dict:
    return {
        key_of(case): reference_training(
            case["trainable_blocks"], options=case["options"], sgd=case["sgd"], max_grad_norm=case["max_grad_norm"]
        )
        for case in {key_of(case): case for case in CASES.values()}.values()
    }


def key_of(case: dict) -> tuple:
    """Return what the reference of a case depends on."""
    return case["trainable_blocks"], case["sgd"], *case["options"]


def drop_key_bias(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Drop the key's bias. Its true gradient is zero, so Adam amplifies rounding errors."""
    return weight if not name.endswith("c_attn.bias") else torch.cat([weight[:24], weight[48:]])


def largest_difference(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, has_key_bias: bool
) -> tuple[float, str]:
    """Return the largest difference of any weight, and its name."""
    assert found.keys() == expected.keys()
    differences = {name: value - expected[name] for name, value in found.items()}
    if not has_key_bias:
        differences = {name: drop_key_bias(name, difference) for name, difference in differences.items()}
    return max((float(difference.abs().max()), name) for name, difference in differences.items())


@pytest.mark.parametrize(("saved", "name"), EVERYWHERE, indirect=["saved"])
def test_every_engine_trains_the_reference_weights(saved, references, name):
    num_ranks, directory = saved
    case, facts = CASES[name], json.loads((directory / f"{name}.json").read_text())
    reference = references[key_of(case)]
    assert len(facts["losses"]) == NUM_STEPS
    np.testing.assert_allclose(facts["losses"], reference["losses"], rtol=1e-5)
    np.testing.assert_allclose(facts["norms"], reference["norms"], rtol=1e-5)
    weights = load_file(directory / f"{name}.safetensors")
    difference, weight = largest_difference(weights, reference["weights"], has_key_bias=case["sgd"])
    assert difference < TOLERANCE, weight
    assert facts["predictions"] == reference["predictions"]
    assert facts["confusion"] == reference["confusion"]
    assert facts["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    # Check the case: micro-batches, unequal and empty shares, clipping.
    assert max(facts["micro_batches"]) == 1 if case["max_tokens"] == WHOLE else max(facts["micro_batches"]) > 1
    assert all(sum(shares) in (BATCH, len(LENGTHS) % BATCH) for shares in facts["shares"])
    if num_ranks > 1:
        assert any(len(set(shares)) > 1 for shares in facts["shares"])
    if num_ranks == 3:
        assert any(0 in shares for shares in facts["shares"])
    assert min(facts["norms"]) > (case["max_grad_norm"] or 1.0), "every step is clipped"


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith(f"-2-{PARTS}-adamw")])
def test_engines_have_the_given_settings(saved, name):
    num_ranks, directory = saved
    facts, engine = json.loads((directory / f"{name}.json").read_text()), CASES[name]["engine"]
    assert (facts["optimizer"], facts["kinds"]) == ("AdamW", ["torch.float32"])
    if engine.startswith("zero"):
        assert facts["kind"] == "DeepSpeedEngine"
        assert (facts["stage"], facts["accumulation"], facts["clipping"]) == (int(engine[4]), 1, 1.0)
        assert (facts["reduced_in"], facts["accumulated_in"]) == ("torch.float32", "torch.float32")
    elif engine == "fsdp" and num_ranks > 1:
        assert facts["kind"] == "FSDPSuffix"
    else:
        assert facts["kind"] == "DistributedDataParallel"
        assert (facts["static_graph"], facts["find_unused_parameters"]) == (False, False)
        assert facts["bucket_bytes"] == choose_bucket_megabytes(0) * 2**20
    is_sharded = engine.startswith("zero3") or engine == "fsdp"
    assert facts["local_weights"] == pytest.approx(1 / num_ranks if is_sharded else 1.0, rel=0.05)
    is_sharded = is_sharded or engine.startswith("zero")
    assert facts["local_moments"] == pytest.approx(1 / num_ranks if is_sharded else 1.0, rel=0.05)


@pytest.mark.parametrize("control", MEANS_OF_MEANS, ids=lambda control: control["name"])
def test_means_of_means_train_other_weights(saved, references, control):
    num_ranks, directory = saved
    weights = load_file(directory / f"{control['name']}.safetensors")
    difference, _ = largest_difference(weights, references[1, False]["weights"], has_key_bias=False)
    assert difference < TOLERANCE if num_ranks == 1 else difference > 50 * TOLERANCE


@pytest.mark.parametrize(
    "changed", [{"max_grad_norm": 0.0}, {"weight_decay": 0.0}, {"batches": global_batches()[::-1]}, {"batches": []}]
)
def test_the_tolerance_detects_other_trainings(references, changed):
    """Check no clipping, no weight decay, another order and no training."""
    other = reference_training(2, **changed)["weights"]
    assert largest_difference(other, references[2, False]["weights"], has_key_bias=False)[0] > 5 * TOLERANCE


@pytest.mark.parametrize("saved", [2], indirect=True)
def test_each_precision_gives_the_same_under_every_engine(saved):
    _, directory = saved
    found = json.loads((directory / "precisions.json").read_text())
    assert len(found) == 7
    exact = json.loads((directory / f"ddp-1-{WHOLE}-adamw.json").read_text())["losses"][:4]
    for name, facts in found.items():
        precision, engine = name.split()
        assert facts["kinds"] == ["torch.float32"], "trainable weights and moments"
        assert facts["frozen"] == [{"bf16": "torch.bfloat16", "fp16": "torch.float16"}[precision]]
        assert {facts.get(key, "torch.float32") for key in ("reduced_in", "accumulated_in")} == {"torch.float32"}
        assert facts["scale"] == found[f"{precision} ddp"]["scale"], "the same updates were skipped"
        assert facts["scale"] in ((2.0**16, 2.0**15) if precision == "fp16" else (1.0,))
        np.testing.assert_allclose(facts["losses"], found[f"{precision} ddp"]["losses"], rtol=1e-5, err_msg=engine)
        norms, of_ddp = (np.array(each["norms"], float) for each in (facts, found[f"{precision} ddp"]))
        np.testing.assert_allclose(norms, of_ddp, rtol=1e-3, err_msg=engine)  # NaN for a skipped update
        np.testing.assert_allclose(facts["losses"], exact, rtol=2e-2)
        assert facts["losses"] != exact, "control: it computed in another precision"


@pytest.mark.parametrize("saved", [2], indirect=True)
@pytest.mark.parametrize("engine", ["ddp", "zero2", "fsdp"])
def test_compressed_gradients_are_rounded_to_bf16(saved, engine):
    """Check a relative error of about 2e-3: bf16 keeps 8 bits. Subtracting weights loses a tenth of that."""
    _, directory = saved
    assert 1e-3 < measure_update_error(directory / f"compressed-{engine}.safetensors") < 1e-2
    assert measure_update_error(directory / "exact-ddp.safetensors") < 3e-4


def measure_update_error(path: Path) -> float:
    """Return the error of one SGD update, relative to the reference."""
    update, reference = load_file(path), reference_gradients_of_first_batch()
    assert update.keys() == reference.keys()
    difference = sum(float((update[key] / LR - value).square().sum()) for key, value in reference.items())
    return math.sqrt(difference / sum(float(value.square().sum()) for value in reference.values()))


def reference_gradients_of_first_batch() -> dict[str, torch.Tensor]:
    model, tokens_NT, mask_NT = toy_reference_model(LENGTHS, 1, torch.float32)
    (ids, *_) = global_batches()
    logits_BC = model(input_ids=tokens_NT[ids], attention_mask=mask_NT[ids]).logits
    torch.nn.functional.cross_entropy(logits_BC, torch.from_numpy(toy_split(LENGTHS).labels)[ids]).backward()
    return {our_name(name): weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
