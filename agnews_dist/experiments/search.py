"""Combinations of a sweep that Optuna proposes from the results so far.

Every process of a sweep proposes by itself. From the same results each proposes the same, so nothing but results is shared.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from agnews_dist.errors import ConfigError, UserError
from agnews_dist.experiments.space import Dimension, Space

SearchKind = Literal["random", "optuna"]
MAX_REPEATED = 50
"""Proposals in a row that were tried before or are refused, after which Optuna's search ends."""
Settings = Mapping[str, Any]


class OptunaSearch:
    """Proposals of Optuna's tree-structured Parzen estimator, in rounds."""

    def __init__(
        self, space: Space, *, num_samples: int, per_round: int, seed: int, check: Callable[[Settings], object] = lambda _: None
    ) -> None:
        """Start a study in memory. `per_round`: combinations to propose before the results of the former ones are known.

        `check`: raises ConfigError for a combination that contradicts itself. It is a failed trial, and another is proposed.

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
        self._space, self._num_samples, self._per_round, self._check = space, num_samples, per_round, check
        self._trials: list[Any] = []
        self._num_scored = 0
        self._tried: set[tuple[Any, ...]] = set()
        self.refused: list[str] = []
        """Reasons of refused combinations."""

    def rounds(self) -> Iterator[list[Settings]]:
        """Yield the combinations of each round. Call `tell` before the next one.

        Raises:
            ConfigError: every proposal of the first round is refused.
        """
        while len(self._trials) < self._num_samples:
            proposed = self._propose(min(self._per_round, self._num_samples - len(self._trials)))
            if not proposed and not self._trials:
                raise ConfigError(f"--search optuna: every proposal contradicts itself. The first: {self.refused[0]}")
            if not proposed:
                return
            yield proposed

    def tell(self, scores: Sequence[float]) -> None:
        """Report the scores of all combinations so far, in their order; minus infinity for one that diverged."""
        # Those of former rounds have theirs.
        for trial, score in zip(self._trials[self._num_scored :], scores[self._num_scored :], strict=True):
            self._end(trial, score)
        self._num_scored = len(self._trials)

    def _end(self, trial: Any, score: float = -math.inf) -> None:
        import optuna

        is_finite = math.isfinite(score)
        state = optuna.trial.TrialState.COMPLETE if is_finite else optuna.trial.TrialState.FAIL
        self._study.tell(trial, score if is_finite else None, state=state)

    def _propose(self, number: int) -> list[Settings]:
        found, num_failed = list[Settings](), 0
        while len(found) < number and num_failed < MAX_REPEATED:
            trial = self._study.ask()
            settings = {dimension.key: _suggest(trial, dimension) for dimension in self._space.dimensions}
            values = tuple(settings.values())
            if values in self._tried or not self._admits(settings):
                num_failed += 1
                self._end(trial)
            else:
                num_failed = 0
                self._trials.append(trial)
                found.append(settings)
            self._tried.add(values)
        return found

    def _admits(self, settings: Settings) -> bool:
        try:
            self._check(settings)
        except ConfigError as error:
            self.refused.append(str(error))
            return False
        return True


def _suggest(trial: Any, dimension: Dimension) -> Any:
    """Draw a value of a setting. A list is a choice among its positions, as values may be lists themselves."""
    interval = dimension.interval
    if interval is None:
        return dimension.values[trial.suggest_categorical(dimension.key, list(range(len(dimension.values))))]
    drawn = trial.suggest_float(dimension.key, interval.low, interval.high, log=interval.is_logarithmic)
    return interval.round(drawn)
