"""The solved `out_head` against scikit-learn's logistic regression, and the standardised inputs against numpy."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from support.events import recorder
from support.toy import CLASS_WEIGHTS, toy_classifier, toy_split

from agnews_dist.data.batching.loader import TokenTable, TrainLoader
from agnews_dist.data.batching.settings import PlanSettings
from agnews_dist.distributed.world import World
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import ConfigError, Stopped
from agnews_dist.evaluation.evaluator import evaluate_split
from agnews_dist.events import Event, StepDone
from agnews_dist.model.export import fold_standard
from agnews_dist.model.prefix import uncached_features
from agnews_dist.model.suffix import Standard
from agnews_dist.report.event_log import EventLog
from agnews_dist.training.checkpoint import Checkpoint, list_checkpoints, read_checkpoint
from agnews_dist.training.checkpoint_manager import CheckpointManager, CheckpointSettings
from agnews_dist.training.head_inputs import measure_standard
from agnews_dist.training.lbfgs import GRADIENT_TOLERANCE, HeadSolver
from agnews_dist.training.loop import Monitors, Trainer
from agnews_dist.training.timing import StageTimer
from agnews_dist.training.trainer_settings import TrainerSettings

LENGTHS = np.random.default_rng(4).integers(1, 31, 150).tolist()
WEIGHT_DECAY = 0.02
SETTINGS: dict[str, Any] = {
    "epochs": 3,
    "max_steps": None,
    "lr": 1e-2,
    "weight_decay": WEIGHT_DECAY,
    "warmup_ratio": 0.0,
    "schedule": "linear",
    "max_grad_norm": 1.0,
    "label_smoothing": 0.0,
    "best_metric": "accuracy",
    "evaluate_every": "epoch",
    "patience": None,
    "nonfinite": "stop",
    "seed": 3,
    "class_names": ("a", "b", "c", "d"),
}


class FakePreemptionHandler:
    """Asks to stop from the first moment, or never."""

    def __init__(self, *, is_stopping: bool) -> None:
        self.is_stopping = is_stopping
        self.is_exiting = False

    def begin_exit(self) -> None:
        """Record the call."""
        self.is_exiting = True


class Run:
    """One start of a small training of the head."""

    def __init__(
        self, directory: Path, *, solver: str = "lbfgs", class_weights: bool = False, is_stopping: bool = False, **changes: Any
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.engine = Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)
        self.classifier, self.events = toy_classifier(0), list[Event]()
        self.table, self.folder = TokenTable(toy_split(LENGTHS), pad_id=0, device=self.engine.device), directory / "checkpoints"
        weights_C = np.array(CLASS_WEIGHTS) if class_weights else None
        plan = PlanSettings(global_batch_size=6)
        loader = TrainLoader(
            self.table, self.engine.world, plan, max_tokens_per_rank=100, quadratic=0.0, class_weights_C=weights_C
        )
        preemption: Any = FakePreemptionHandler(is_stopping=is_stopping)
        monitors = Monitors(recorder(self.events), StageTimer(0.0), preemption)
        settings = TrainerSettings(**{**SETTINGS, "solver": solver, **changes})
        kind = HeadSolver if solver == "lbfgs" else Trainer
        self.trainer = kind(self.classifier, self.engine, loader, settings, monitors)
        self.trainer.use_features(uncached_features(self.classifier.prefix))
        self._log = EventLog(directory / "events.jsonl")

    def load(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint."""
        best = read_checkpoint(checkpoint.path.with_name(checkpoint.state["best"]["name"]))
        self.trainer.load_state(checkpoint.state, checkpoint.tensors, best.tensors)

    def fit(self) -> None:
        """Train to the end."""
        manager = CheckpointManager(
            lambda: self.folder,
            self.trainer.strategy,
            CheckpointSettings(keep=9, every_steps=None, every_minutes=None),
            metadata={"precision": self.engine.precision},
            log=self._log,
            emit=recorder(self.events),
        )
        with closing(manager):
            self.trainer.fit(lambda: evaluate_split(self.classifier, self.table, self.engine), manager)

    def inputs(self) -> np.ndarray:
        """Return the inputs of `out_head` of all rows, by the plain path of a new classifier."""
        fresh = toy_classifier(0)
        fresh.use_fast_path(False)
        with torch.no_grad():
            batch = self.table.batch(np.arange(len(self.table)))
            features = fresh.prefix.features(batch.tokens_BT, batch.lengths_B)
            return fresh.suffix(*features, stops_before_head=True).numpy()

    def probabilities(self) -> np.ndarray:
        """Return the probabilities of all rows in the trained classifier."""
        with torch.no_grad():
            batch = self.table.batch(np.arange(len(self.table)))
            return self.classifier.logits(batch.tokens_BT, batch.lengths_B).double().softmax(dim=1).numpy()


@pytest.mark.parametrize("class_weights", [False, True])
@pytest.mark.parametrize("standardize", [False, True])
def test_solution_equals_scikit_learns(tmp_path, class_weights, standardize):
    run = Run(tmp_path, class_weights=class_weights, standardize=standardize)
    run.fit()
    inputs_ND, labels_N = run.inputs().astype(np.float64), run.table.labels_N
    if standardize:
        inputs_ND = (inputs_ND - inputs_ND.mean(axis=0)) / inputs_ND.std(axis=0)
    weights = dict(enumerate(CLASS_WEIGHTS)) if class_weights else None
    divisor = np.array(CLASS_WEIGHTS)[labels_N].sum() if class_weights else len(labels_N)
    # C times the sum of the losses + half the sum of squares: the same objective, times C times the divisor.
    reference = LogisticRegression(C=1 / (WEIGHT_DECAY * divisor), class_weight=weights, tol=1e-10, max_iter=10_000)
    expected_NC = reference.fit(inputs_ND, labels_N).predict_proba(inputs_ND)
    np.testing.assert_allclose(run.probabilities(), expected_NC, rtol=0, atol=1e-4)
    weaker = LogisticRegression(C=2 / (WEIGHT_DECAY * divisor), class_weight=weights, max_iter=10_000)
    other_NC = weaker.fit(inputs_ND, labels_N).predict_proba(inputs_ND)
    assert np.abs(other_NC - expected_NC).max() > 1e-3, "control: another L2 term has other probabilities"
    steps = [event for event in run.events if isinstance(event, StepDone)]
    assert [event.step for event in steps] == list(range(1, run.trainer.step + 1))
    assert np.diff([event.loss for event in steps]).max() <= 0
    assert steps[-1].grad_norm <= GRADIENT_TOLERANCE * 10


def test_label_smoothing_is_in_the_objective(tmp_path):
    run = Run(tmp_path, label_smoothing=0.3, weight_decay=1e-4)
    run.fit()
    head = [weight.detach().double().requires_grad_() for weight in run.classifier.suffix.out_head.parameters()]
    logits_NC = torch.nn.functional.linear(torch.from_numpy(run.inputs()).double(), *head)
    loss = torch.nn.functional.cross_entropy(logits_NC, torch.from_numpy(run.table.labels_N), label_smoothing=0.3)
    (loss + 0.5e-4 * head[0].square().sum()).backward()
    assert max(float(weight.grad.abs().max()) for weight in head) < 1e-5, "the gradient is zero, up to fp32"


def test_solution_does_not_depend_on_the_start(tmp_path):
    run = Run(tmp_path / "one")
    other = Run(tmp_path / "other")
    with torch.no_grad():
        other.classifier.suffix.out_head.weight.mul_(-3)
    run.fit()
    other.fit()
    assert torch.equal(run.classifier.suffix.out_head.weight, other.classifier.suffix.out_head.weight)
    assert torch.equal(run.classifier.suffix.ln_f.weight, toy_classifier(0).suffix.ln_f.weight), "the norm stays as it was"


def test_finished_solution_is_loaded_and_not_solved_again(tmp_path):
    run = Run(tmp_path, standardize=True)
    run.fit()
    [path] = list_checkpoints(run.folder)
    assert path.name == f"step-{run.trainer.step:08d}-scored"
    checkpoint = read_checkpoint(path)
    again = Run(tmp_path, standardize=True)
    again.load(checkpoint)
    assert again.trainer.is_done
    assert np.array_equal(again.probabilities(), run.probabilities())
    again.fit()
    assert not any(isinstance(event, StepDone) for event in again.events)
    assert again.trainer.end_reason == f"it has solved out_head in {run.trainer.step} iterations"


def test_stop_request_ends_the_iterations(tmp_path):
    run = Run(tmp_path, is_stopping=True)
    with pytest.raises(Stopped):
        run.fit()
    assert list_checkpoints(run.folder) == []
    assert run.trainer.step == 0


def test_standard_is_numpys_and_survives_a_checkpoint(tmp_path):
    run = Run(tmp_path, solver="adamw", standardize=True)
    inputs_ND = run.inputs().astype(np.float64)
    run.fit()
    standard = run.classifier.suffix.standard
    np.testing.assert_allclose(standard.mean_D.numpy(), inputs_ND.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(standard.deviation_D.numpy(), inputs_ND.std(axis=0), rtol=1e-5)
    # The norm has been trained since, so measuring again would give other numbers.
    checkpoint = read_checkpoint(list_checkpoints(run.folder)[0])
    again = Run(tmp_path, solver="adamw", standardize=True)
    again.load(checkpoint)
    loaded = again.classifier.suffix.standard
    assert all(map(torch.equal, loaded, standard))
    assert np.array_equal(again.probabilities(), run.probabilities())


def test_constant_inputs_keep_their_scale_and_a_head_without_bias_its_mean():
    engine = Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)
    table = TokenTable(toy_split(LENGTHS), pad_id=0, device=engine.device)
    for num_classes in (4, 20):
        classifier = toy_classifier(0, num_classes=num_classes)
        with torch.no_grad():
            classifier.suffix.ln_f.weight[3], classifier.suffix.ln_f.bias[3] = 0.0, 123.456
        features = uncached_features(classifier.prefix)
        standard = measure_standard(classifier.suffix, table, features, engine, None)
        assert standard.deviation_D[3] == 1
        assert standard.mean_D[3] == pytest.approx(123.456 if num_classes == 4 else 0)
        assert bool(standard.mean_D.any()) == (num_classes == 4)


def test_standard_folds_into_the_head():
    generator = torch.Generator().manual_seed(0)
    inputs_BD, weight_CD = (torch.randn(shape, generator=generator) for shape in ((50, 24), (4, 24)))
    inputs_BD[:, 3] += 1000  # as GPT-2's widest dimensions
    standard = Standard(inputs_BD.mean(dim=0), inputs_BD.std(dim=0))
    bias_C = torch.tensor([1.0, -2.0, 0.5, 0.0])
    expected_BC = torch.nn.functional.linear(standard.apply(inputs_BD.double()), weight_CD.double(), bias_C.double())
    folded_CD, shifted_C = fold_standard(weight_CD, bias_C, standard)
    found_BC = torch.nn.functional.linear(inputs_BD.double(), folded_CD.double(), shifted_C)
    torch.testing.assert_close(found_BC, expected_BC, rtol=1e-5, atol=1e-5)
    scaled_CD, nothing = fold_standard(weight_CD, None, standard)
    assert nothing is None
    assert torch.equal(scaled_CD, folded_CD)


def test_soft_targets_are_refused():
    with pytest.raises(ConfigError, match="it fits labels, and not probabilities"):
        HeadSolver.use_soft_targets(object.__new__(HeadSolver), torch.ones(1, 2))
