"""Worker of test_gradients.py: gradients of one global batch, in several numbers of micro-batches."""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from support.toy import CLASS_WEIGHTS, toy_classifier, toy_split

from agnews_dist.data.batching.batch import Batch
from agnews_dist.data.batching.loader import StepBatches, TokenTable, TrainLoader
from agnews_dist.data.batching.settings import PlanSettings
from agnews_dist.distributed import collectives
from agnews_dist.distributed.world import detect_world
from agnews_dist.engine.engine import Engine
from agnews_dist.engine.strategy import Strategy
from agnews_dist.model.dropout import step_key
from agnews_dist.model.prefix import Features, uncached_features
from agnews_dist.training.losses import StepSettings, example_losses
from agnews_dist.training.step import NonFiniteError, accumulate_gradients, train_step

R_DROP, DROPOUT, SEED, STEP = 0.7, 0.2, 5, 41
LOSSES = {
    "plain": StepSettings(),
    "smoothed": StepSettings(label_smoothing=0.1),
    "weighted": StepSettings(class_weights_C=torch.tensor(CLASS_WEIGHTS, dtype=torch.float64)),
    "both": StepSettings(label_smoothing=0.1, class_weights_C=torch.tensor(CLASS_WEIGHTS, dtype=torch.float64)),
    "r_drop": StepSettings(r_drop=R_DROP),
    "weighted_r_drop": StepSettings(r_drop=R_DROP, class_weights_C=torch.tensor(CLASS_WEIGHTS, dtype=torch.float64)),
}


def mean_of_means(engine: Engine, embed, strategy: Strategy, batches: StepBatches) -> None:
    """Average the means of the ranks, as DDP does by default. The negative control."""
    (batch,) = batches.micro_batches
    loss = example_losses(strategy(*embed(batch)), batch).sum()
    (loss / batch.weights_B.sum()).backward()


def main() -> None:
    output, lengths = Path(sys.argv[1]), [int(length) for length in sys.argv[2].split(",")]
    world = detect_world(os.environ)
    engine = Engine(world, device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)
    classifier = toy_classifier(dropout=DROPOUT)
    prefix, suffix = classifier.prefix.double(), classifier.suffix.double().eval()
    optimizer, embed = torch.optim.SGD(suffix.parameters(), lr=1.0), uncached_features(prefix)
    strategy = engine.prepare(suffix, optimizer, max_grad_norm=0.1)

    def one_step(max_tokens: int, lengths: list[int] = lengths, settings: StepSettings = LOSSES["plain"]) -> StepBatches:
        """Return all examples as one global batch."""
        weights_C = None if settings.class_weights_C is None else np.array(CLASS_WEIGHTS)
        table = TokenTable(toy_split(lengths), pad_id=0, device=engine.device)
        plan = PlanSettings(global_batch_size=len(lengths))
        loader = TrainLoader(table, world, plan, max_tokens_per_rank=max_tokens, quadratic=0.0, class_weights_C=weights_C)
        (batches,) = loader.steps(0)
        return batches

    def accumulate(batches: StepBatches, settings: StepSettings) -> None:
        """Use dropout with R-Drop only: the references of the other losses have none."""
        suffix.train(settings.r_drop > 0)
        accumulate_gradients(engine, embed, strategy, batches, dropout_key=step_key(SEED, STEP), settings=settings)
        suffix.eval()

    def save(name: str) -> None:
        gradients = {key: value.grad.clone() for key, value in suffix.named_parameters()}
        save_file(gradients, output / f"{name}-rank{world.rank}of{world.num_ranks}.safetensors")
        suffix.zero_grad()

    most, least = len(lengths) * max(lengths), max(lengths)
    limits = {len(one_step(limit).micro_batches): limit for limit in range(most, least - 1, -5)}
    for loss, settings in LOSSES.items():
        for accumulation in (1, 2, 4):
            batches = one_step(limits[accumulation], settings=settings)
            assert len(batches.micro_batches) == accumulation
            accumulate(batches, settings)
            save(f"{loss}-accumulation{accumulation}")
    # One example for all ranks: the other ranks compute a filler row that must not count.
    for loss, settings in LOSSES.items():
        accumulate(one_step(100_000, lengths[:1], settings), settings)
        save(f"{loss}-one_example")
    mean_of_means(engine, embed, strategy, one_step(100_000))
    save("mean_of_means")

    # Clipping acts on the global gradient: norm and update must not depend on the ranks either.
    before = {key: value.detach().clone() for key, value in suffix.named_parameters()}
    result = train_step(engine, embed, strategy, one_step(100_000))
    update = {key: before[key] - value.detach() for key, value in suffix.named_parameters()}
    save_file(
        {
            **update,
            "loss": torch.tensor(result.loss, dtype=torch.float64),
            "grad_norm": torch.tensor(result.grad_norm, dtype=torch.float64),
        },
        output / f"clipped-rank{world.rank}of{world.num_ranks}.safetensors",
    )

    # One rank alone has NaN: no rank may update, all must raise.
    def poisoned(batch: Batch) -> Features:
        hidden_BTD, lengths_B = embed(batch)
        is_poisoned = world.rank == world.num_ranks - 1
        return Features(hidden_BTD * float("nan") if is_poisoned else hidden_BTD, lengths_B)

    before = {key: value.detach().clone() for key, value in suffix.named_parameters()}
    message = ""
    try:
        train_step(engine, poisoned, strategy, one_step(100_000))
    except NonFiniteError as error:
        message = str(error)
    assert f"non-finite loss on rank(s) {world.num_ranks - 1}, of examples " in message, message
    assert all(torch.equal(before[key], value) for key, value in suffix.named_parameters())

    suffix.zero_grad()
    # Any rank can stop all; only rank 0 decides about checkpoints.
    is_last = world.rank == world.num_ranks - 1
    result = train_step(engine, embed, strategy, one_step(100_000), stop=is_last, save=not is_last)
    assert (result.stop, result.save) == (True, world.num_ranks > 1)
    result = train_step(engine, embed, strategy, one_step(100_000), save=world.rank > 0)
    assert (result.stop, result.save) == (False, False)


if __name__ == "__main__":
    main()
    # Outside of main(): the DDP module must be freed before its process group (see collectives.close).
    collectives.close()
