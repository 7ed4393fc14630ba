"""Every engine trains the same weights as Hugging Face's module in one process, on 1, 2 and 3 ranks, whatever the shares.

DDP, FSDP2, ZeRO 1, 2, 3, with and without offloading x accumulation x trainable blocks, 20 updates each; one launch per number
of ranks holds all of it, and what an engine must refuse, bring back and leave alone.
"""

import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import REPOSITORY, torchrun
from safetensors.torch import load_file
from toy import our_name, toy_reference_model, toy_split

from agnews_dist.data.batching import PlanSettings, plan
from agnews_dist.engine import bucket_megabytes

RANKS = (1, 2, 3)
# Very unequal shares; 29 = 3 batches of 9 and one of 2, so that with three ranks one of them has nothing.
LENGTHS = [30, 30, 28, 28, 27, 26, 25, 25, 24, 20, 20, 18, 17, 16, 12, 9, 8, 7, 7, 5, 5, 4, 3, 3, 2, 1, 1, 1, 1]
EVALUATION_LENGTHS = [30, 22, 17, 12, 9, 9, 7, 5, 3, 2, 1]
NUM_STEPS, LR, WEIGHT_DECAY, BATCH = 20, 1e-3, 0.1, 9
BROKEN = "AGNEWS_MUTANT" in os.environ
ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
# Most tokens of a micro-batch: all in one, or about half of the largest share.
WHOLE, PARTS = 10_000, 60


def cases() -> list[dict]:
    made = [
        {"engine": engine, "trainable_blocks": blocks, "max_tokens": tokens, "max_grad_norm": 1.0, "sgd": False}
        for engine, blocks, tokens in itertools.product(ENGINES, (1, 2, "all"), (WHOLE, PARTS))
    ]
    made += [
        {"engine": engine, "trainable_blocks": 2, "max_tokens": PARTS, "max_grad_norm": 1.0, "sgd": False}
        for engine in ("zero2-offload", "zero3-offload")
    ]
    made += [
        {"engine": engine, "trainable_blocks": 2, "max_tokens": PARTS, "max_grad_norm": 0.0, "sgd": True}
        for engine in ENGINES
    ]
    for case in made:
        kind = "sgd" if case["sgd"] else "adamw"
        case["name"] = f"{case['engine']}-{case['trainable_blocks']}-{case['max_tokens']}-{kind}"
    # A minute for each contract that is broken on purpose would be too long.
    return [case for case in made if not BROKEN or case["name"] in (f"zero1-1-{PARTS}-adamw", f"zero3-1-{PARTS}-adamw")]


CASES = {case["name"]: case for case in cases()}


@pytest.fixture(scope="module", params=RANKS)
def saved(request, tmp_path_factory) -> tuple[int, Path]:
    directory, extensions = (tmp_path_factory.mktemp(f"{what}{request.param}") for what in ("ranks", "extensions"))
    told = {
        "lengths": LENGTHS,
        "evaluation_lengths": EVALUATION_LENGTHS,
        "global_batch_size": BATCH,
        "num_steps": NUM_STEPS,
        "lr": LR,
        "weight_decay": WEIGHT_DECAY,
        "cases": list(CASES.values()),
        "checked": ["zero3"] if BROKEN else None,
    }
    path = directory / "told.json"
    path.write_text(json.dumps(told))
    worker = REPOSITORY / "tests" / "ranks" / "engine_worker.py"
    torchrun(request.param, str(worker), str(directory), str(path), TORCH_EXTENSIONS_DIR=str(extensions))
    return request.param, directory


def global_batches() -> list[np.ndarray]:
    """Which texts form each of the first batches: of the plan, which knows no ranks and no engines."""
    settings = PlanSettings(global_batch_size=BATCH)
    epochs = (plan(np.array(LENGTHS), settings, epoch=epoch).global_batches() for epoch in range(9))
    return list(itertools.islice(itertools.chain.from_iterable(epochs), NUM_STEPS))


def reference_training(trainable_blocks: int | str, *, sgd: bool, max_grad_norm: float) -> dict:
    """Hugging Face's module, torch's optimizer, mean cross-entropy over whole batches, one process, no code of ours."""
    num_blocks = 3 if trainable_blocks == "all" else int(trainable_blocks)
    model, tokens_NT, mask_NT = toy_reference_model(LENGTHS, num_blocks, torch.float32)
    labels_N = torch.from_numpy(toy_split(LENGTHS).labels)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    decayed = [weight for weight in trained.values() if weight.ndim >= 2]
    others = [weight for weight in trained.values() if weight.ndim < 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(trained.values(), lr=LR) if sgd else torch.optim.AdamW(groups, lr=LR)
    losses, norms = [], []
    for ids in global_batches():
        optimizer.zero_grad()
        logits_BC = model(input_ids=tokens_NT[ids], attention_mask=mask_NT[ids]).logits
        loss = torch.nn.functional.cross_entropy(logits_BC, labels_N[ids])
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), max_grad_norm or math.inf)))
        losses.append(loss.item())
        optimizer.step()
    weights = {our_name(name): weight.detach() for name, weight in trained.items()}
    evaluated, ids_NT, mask = toy_reference_model(EVALUATION_LENGTHS, num_blocks, torch.float32)
    evaluated.load_state_dict(model.state_dict())
    predictions = evaluated(input_ids=ids_NT, attention_mask=mask).logits.argmax(dim=1)
    return {"losses": losses, "norms": norms, "weights": weights, "predictions": predictions.tolist()}


@pytest.fixture(scope="module")
def references() -> dict:
    wanted = {(case["trainable_blocks"], case["sgd"], case["max_grad_norm"]) for case in CASES.values()}
    return {(k, sgd): reference_training(k, sgd=sgd, max_grad_norm=limit) for k, sgd, limit in wanted}


def without_key_bias(name: str, weight: torch.Tensor) -> torch.Tensor:
    """The key's bias adds the same to all scores of a query: its true gradient is zero, and Adam takes rounding for one."""
    return weight if not name.endswith("c_attn.bias") else torch.cat([weight[:24], weight[48:]])


@pytest.mark.parametrize("name", CASES)
def test_every_engine_trains_the_references_weights(saved, references, name):
    num_ranks, directory = saved
    case, facts = CASES[name], json.loads((directory / f"{name}.json").read_text())
    reference = references[case["trainable_blocks"], case["sgd"]]
    assert len(facts["losses"]) == NUM_STEPS
    np.testing.assert_allclose(facts["losses"], reference["losses"], rtol=1e-5)
    np.testing.assert_allclose(facts["norms"], reference["norms"], rtol=1e-4)
    weights = load_file(directory / f"{name}.safetensors")
    assert weights.keys() == reference["weights"].keys()
    for key, expected in reference["weights"].items():
        found, wanted = weights[key], expected
        if not case["sgd"]:
            found, wanted = without_key_bias(key, found), without_key_bias(key, wanted)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")
    assert facts["predictions"] == reference["predictions"]
    assert sum(map(sum, facts["confusion"])) == len(EVALUATION_LENGTHS)
    # The case is what it says: micro-batches, unequal and empty shares, clipping in force.
    assert max(facts["micro_batches"]) == 1 if case["max_tokens"] == WHOLE else max(facts["micro_batches"]) > 1
    assert all(sum(shares) in (BATCH, len(LENGTHS) % BATCH) for shares in facts["shares"])
    if num_ranks > 1:
        assert any(len(set(shares)) > 1 for shares in facts["shares"])
    if num_ranks == 3:
        assert any(0 in shares for shares in facts["shares"])
    assert min(facts["norms"]) > 1.0, "clipping was in force where it was on"


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith(f"-2-{PARTS}-adamw")])
def test_an_engine_is_what_it_was_told_to_be(saved, name):
    num_ranks, directory = saved
    facts, engine = json.loads((directory / f"{name}.json").read_text()), CASES[name]["engine"]
    if engine.startswith("zero"):
        assert facts["kind"] == "DeepSpeedEngine"
        assert facts["stage"] == int(engine[4])
        assert (facts["accumulation"], facts["clipping"], facts["optimizer"]) == (1, 1.0, "AdamW")
    elif engine == "fsdp" and num_ranks > 1:
        assert facts["kind"] == "FSDPSuffix"
    else:
        assert facts["kind"] == "DistributedDataParallel"
        assert (facts["static_graph"], facts["find_unused_parameters"]) == (False, False)
        assert facts["bucket_bytes"] == bucket_megabytes(0) * 2**20
    divides = engine.startswith("zero3") or engine == "fsdp"
    assert facts["held"] == pytest.approx(1 / num_ranks if divides else 1.0, rel=0.1), "the part of a weight on a rank"


def test_precisions_are_the_same_under_every_engine(saved):
    _, directory = saved
    found = json.loads((directory / "precisions.json").read_text())
    assert len(found) == 7
    exact = json.loads((directory / f"ddp-1-{WHOLE}-adamw.json").read_text())["losses"][:4]
    for name, facts in found.items():
        precision, engine = name.split()
        assert facts["kinds"] == ["torch.float32"], "what trains is stored in fp32"
        assert facts["scale"] == found[f"{precision} ddp"]["scale"], "the same updates were left out"
        assert facts["scale"] in ((2.0**16, 2.0**15) if precision == "fp16" else (1.0,))
        np.testing.assert_allclose(facts["losses"], found[f"{precision} ddp"]["losses"], rtol=1e-5, err_msg=engine)
        norms, of_ddp = (np.array(told["norms"], float) for told in (facts, found[f"{precision} ddp"]))
        np.testing.assert_allclose(norms, of_ddp, rtol=1e-3, err_msg=engine)  # of an update left out: NaN
        np.testing.assert_allclose(facts["losses"], exact, rtol=2e-2)
        assert facts["losses"] != exact, "it did compute in another precision"


@pytest.mark.parametrize("engine", ["ddp", "zero2", "fsdp"])
def test_compressed_gradients_are_rounded_and_no_more(saved, engine):
    num_ranks, directory = saved
    update = load_file(directory / f"compressed-{engine}.safetensors")
    reference = reference_gradients_of_first_batch()
    difference = math.sqrt(sum(float((update[key] / LR - reference[key]).square().sum()) for key in reference))
    error = difference / math.sqrt(sum(float(value.square().sum()) for value in reference.values()))
    assert error < 1e-2
    if num_ranks > 1:
        assert error > 1e-4, "the control: it was rounded"


def reference_gradients_of_first_batch() -> dict[str, torch.Tensor]:
    model, tokens_NT, mask_NT = toy_reference_model(LENGTHS, 1, torch.float32)
    (ids, *_) = global_batches()
    logits_BC = model(input_ids=tokens_NT[ids], attention_mask=mask_NT[ids]).logits
    torch.nn.functional.cross_entropy(logits_BC, torch.from_numpy(toy_split(LENGTHS).labels)[ids]).backward()
    return {our_name(name): weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
