"""Combinations of a sweep that Optuna proposes from the results so far.

Every process of a sweep proposes by itself. From the same results each proposes the same, so nothing but results is shared.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from agnews_dist.errors import UserError
from agnews_dist.experiments.space import Dimension, Space

SearchKind = Literal["random", "optuna"]
MAX_REPEATED = 50
"""Proposals in a row that were tried before, after which Optuna's search ends."""
Settings = Mapping[str, Any]


class OptunaSearch:
    """Proposals of Optuna's tree-structured Parzen estimator, in rounds."""

    def __init__(self, space: Space, *, num_samples: int, per_round: int, seed: int) -> None:
        """Start a study in memory. `per_round`: combinations to propose before the results of the former ones are known.

        Raises:
            UserError: Optuna is not installed.
        """
        try:
            import optuna
        except ImportError:
            raise UserError("--search optuna: it is not installed. Run pip install agnews_dist[sweep].") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            # Of Optuna 4, where this option is an experiment.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=per_round > 1)
        self._study: Any = optuna.create_study(sampler=sampler, direction="maximize")
        self._space, self._num_samples, self._per_round = space, num_samples, per_round
        self._trials: list[Any] = []
        self._tried: dict[tuple[Any, ...], int] = {}

    def rounds(self) -> Iterator[list[Settings]]:
        """Yield the combinations of each round. Call `tell` before the next one."""
        while len(self._trials) < self._num_samples:
            proposed = self._propose(min(self._per_round, self._num_samples - len(self._trials)))
            if not proposed:
                return
            yield proposed

    def tell(self, scores: Sequence[float]) -> None:
        """Report the scores of all combinations so far, in their order; minus infinity for one that diverged."""
        import optuna

        for trial, score in zip(self._trials, scores, strict=True):
            if self._study.trials[trial.number].state == optuna.trial.TrialState.RUNNING:
                is_finite = math.isfinite(score)
                state = optuna.trial.TrialState.COMPLETE if is_finite else optuna.trial.TrialState.FAIL
                self._study.tell(trial, score if is_finite else None, state=state)

    def _propose(self, number: int) -> list[Settings]:
        found, num_repeated = list[Settings](), 0
        while len(found) < number and num_repeated < MAX_REPEATED:
            trial = self._study.ask()
            settings = {dimension.key: _suggest(trial, dimension) for dimension in self._space.dimensions}
            values = tuple(settings.values())
            if values in self._tried:
                num_repeated += 1
                self._study.tell(trial, state=_failed())
                continue
            self._tried[values], num_repeated = len(self._trials), 0
            self._trials.append(trial)
            found.append(settings)
        return found


def _failed() -> Any:
    import optuna

    return optuna.trial.TrialState.FAIL


def _suggest(trial: Any, dimension: Dimension) -> Any:
    """Draw a value of a setting. A list is a choice among its positions, as values may be lists themselves."""
    interval = dimension.interval
    if interval is None:
        return dimension.values[trial.suggest_categorical(dimension.key, list(range(len(dimension.values))))]
    drawn = trial.suggest_float(dimension.key, interval.low, interval.high, log=interval.is_logarithmic)
    return interval.round(drawn)
