"""`out_head` alone, solved to convergence on all training rows by L-BFGS: logistic regression on the frozen model.

The objective is the mean loss of the training, with class weights and label smoothing, plus an L2 term. That is `weight_decay`
/ 2 times the sum of the squared weights, without the bias. It is convex, so the start does not matter: all weights are 0.
Every rank sums the gradient over its own rows. The sum over ranks is the same on all, and so are their iterates. All of it is
in float64.
"""

import math
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from agnews_dist.data.rows import Ints
from agnews_dist.distributed import collectives
from agnews_dist.errors import ConfigError, Stopped
from agnews_dist.evaluation.evaluator import SplitScores
from agnews_dist.events import StepDone, begin_phase
from agnews_dist.training.checkpoint import Groups
from agnews_dist.training.checkpoint_manager import CheckpointManager
from agnews_dist.training.head_inputs import compute_head_inputs
from agnews_dist.training.loop import Trainer
from agnews_dist.training.step import NonFiniteError

MAX_ITERATIONS = 1000
MAX_EVALUATIONS = 26
"""Evaluations of an iteration, of which the line search has all but one."""
HISTORY = 20
"""Pairs of steps and gradient changes that approximate the curvature."""
GRADIENT_TOLERANCE = 1e-7
"""Largest element of the gradient at the solution."""
LOSS_TOLERANCE = 1e-14
"""Relative change of the objective in an iteration below which float64 resolves no more."""
SCALE = 1e6
"""Factor of the objective in the optimizer, which learns no curvature from products of step and gradient change below 1e-10."""
ROWS_PER_CALL = 8192


class Objective:
    """Objective and gradient over the rows of all ranks, at the weights of `parameters`."""

    def __init__(
        self,
        inputs_ND: Tensor,
        labels_N: Tensor,
        parameters: list[Tensor],
        *,
        divisor: float,
        class_weights_C: Tensor | None,
        label_smoothing: float,
        weight_decay: float,
    ) -> None:
        """`inputs_ND`: this rank's rows. `parameters`: weight, and bias if there is one, float64. `divisor`: of the loss."""
        self._inputs_ND, self._labels_N, self._parameters = inputs_ND, labels_N, parameters
        self._divisor, self._weights_C, self._weight_decay = divisor, class_weights_C, weight_decay
        self._label_smoothing = label_smoothing
        self._point: list[Tensor] | None = None
        self.value = 0.0
        self.gradient = torch.zeros(0, dtype=torch.float64)
        """Gradient at the point of the last evaluation, flat."""
        self.is_stopping = False
        """True if some rank had to stop at the last evaluation; the same on every rank."""

    def evaluate(self, *, is_stopping: bool = False) -> None:
        """Compute `value`, `gradient`, and SCALE times it in the parameters. Collective.

        At the point of the last call nothing is computed again.
        """
        if self._point is not None and all(map(torch.equal, self._point, self._parameters)):
            return
        self._point = [parameter.detach().clone() for parameter in self._parameters]
        points = [point.requires_grad_() for point in self._point]
        loss = self._inputs_ND.new_zeros((), dtype=torch.float64)
        for inputs_BD, labels_B in zip(self._inputs_ND.split(ROWS_PER_CALL), self._labels_N.split(ROWS_PER_CALL), strict=True):
            losses = functional.cross_entropy(
                functional.linear(inputs_BD.double(), *points),
                labels_B,
                self._weights_C,
                reduction="sum",
                label_smoothing=self._label_smoothing,
            )
            (losses / self._divisor).backward()
            loss += losses.detach() / self._divisor
        gradients = [torch.zeros_like(point) if point.grad is None else point.grad for point in points]
        stop = loss.new_tensor(float(is_stopping))
        packed = torch.cat([each.reshape(-1) for each in (*gradients, loss, stop)])
        sizes = [each.numel() for each in (*gradients, loss, stop)]
        *sums, loss, stop = collectives.all_reduce(packed).split(sizes)
        weight_CD = self._point[0].detach()
        for parameter, gradient in zip(self._parameters, sums, strict=True):
            parameter.grad = gradient.view_as(parameter)
        cast(Tensor, self._parameters[0].grad).add_(weight_CD, alpha=self._weight_decay)
        self.gradient = torch.cat([cast(Tensor, parameter.grad).reshape(-1) for parameter in self._parameters])
        for parameter in self._parameters:
            cast(Tensor, parameter.grad).mul_(SCALE)
        self.value = loss.item() + 0.5 * self._weight_decay * weight_CD.square().sum().item()
        self.is_stopping = stop.item() > 0


class HeadSolver(Trainer):
    """A training whose steps are the iterations of L-BFGS. A solution takes seconds, so a killed one begins again."""

    def use_soft_targets(self, targets_NC: Tensor) -> None:  # noqa: ARG002
        """Refuse: the solution is for labels.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("optim.solver lbfgs: it fits labels, and not probabilities. Set optim.solver adamw.")

    def load_state(self, state: Mapping[str, Any], tensors: Groups, best_tensors: Groups) -> None:
        super().load_state(state, tensors, best_tensors)
        self.num_steps = self.step

    @property
    def end_reason(self) -> str:
        return f"it has solved out_head in {self.step:,} iterations"

    def iterate(self, validate: Callable[[], SplitScores], checkpoints: CheckpointManager | None = None) -> Generator[None]:
        self._standardise()
        if not self.step:
            self._emit(begin_phase("solve out_head"))
            yield from self._solve()
        if self._is_evaluation_due:
            self._evaluate(validate)
            self._save(checkpoints)

    def _save(self, checkpoints: CheckpointManager | None, *, wait: bool = False) -> None:
        if self.step:
            super()._save(checkpoints, wait=wait)

    def _solve(self) -> Generator[None]:
        """Iterate to convergence, pause after every iteration, and set `out_head` at the end. Collective.

        Raises:
            Stopped: on all ranks, if any had to stop.
            NonFiniteError: on all ranks, if the objective is not finite.
        """
        begin = time.perf_counter()
        # Weight, and bias if there is one.
        targets = list(self._classifier.suffix.out_head.parameters())
        parameters = [torch.zeros_like(target, dtype=torch.float64, requires_grad=False) for target in targets]
        objective = self._build_objective(parameters)
        optimizer = torch.optim.LBFGS(
            parameters,
            max_iter=1,
            max_eval=MAX_EVALUATIONS,
            history_size=HISTORY,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def evaluate() -> float:
            objective.evaluate(is_stopping=self._preemption.is_stopping)
            return SCALE * objective.value

        tokens = int(self._loader.table.lengths_N.sum())
        steps, before = 0, float("inf")
        evaluate()
        while True:
            # The objective is equal on all ranks, so all leave the loop together.
            if objective.is_stopping:
                raise Stopped
            if not math.isfinite(objective.value):
                raise NonFiniteError(f"objective {objective.value} of L-BFGS, of", ())
            has_converged = float(objective.gradient.abs().max()) <= GRADIENT_TOLERANCE
            is_stuck = abs(before - objective.value) <= LOSS_TOLERANCE * max(1.0, abs(objective.value))
            if steps and (has_converged or is_stuck or steps == MAX_ITERATIONS):
                break
            start, before = time.perf_counter(), objective.value
            optimizer.step(cast(Any, evaluate))
            evaluate()
            steps += 1
            self._report(steps, objective, float(optimizer.state[parameters[0]]["t"]), tokens, time.perf_counter() - start)
            yield
        with torch.no_grad():
            for target, solved in zip(targets, parameters, strict=True):
                target.copy_(solved)
        self.step = self.num_steps = steps
        self.totals.tally.real += steps * tokens
        self.totals.tally.padded += steps * tokens
        self.totals.tally.slowest += steps * tokens
        self.totals.seconds += time.perf_counter() - begin

    def _build_objective(self, parameters: list[Tensor]) -> Objective:
        """Compute this rank's inputs of `out_head`, which are fixed from here on."""
        loader, suffix = self._loader, self._classifier.suffix
        assert self._features is not None, "use_features comes first"
        parts = list(compute_head_inputs(suffix, loader.table, self._features, self._engine, loader.owner_N))
        labels_N = torch.from_numpy(loader.table.labels_N)
        inputs = [part.inputs_BD for part in parts] or [torch.zeros(0, suffix.out_head.in_features, device=self._engine.device)]
        ids: list[Ints] = [part.ids_B for part in parts]
        own_N = torch.cat([torch.from_numpy(each) for each in ids]) if ids else torch.zeros(0, dtype=torch.int64)
        weights_C = self._step_settings.class_weights_C
        return Objective(
            torch.cat(inputs),
            labels_N[own_N].to(self._engine.device),
            parameters,
            divisor=float(len(labels_N)) if weights_C is None else float(weights_C.cpu()[labels_N].sum()),
            class_weights_C=weights_C,
            label_smoothing=self._settings.label_smoothing,
            weight_decay=self._settings.weight_decay,
        )

    def _report(self, step: int, objective: Objective, length: float, num_tokens: int, seconds: float) -> None:
        """Emit an iteration as a step: its learning rate is the length that the line search found."""
        self._emit(
            StepDone(
                step=step,
                epoch=1,
                loss=objective.value,
                lr=length,
                grad_norm=float(objective.gradient.norm()),
                num_examples=len(self._loader.table),
                num_tokens=num_tokens,
                seconds=seconds,
            )
        )
