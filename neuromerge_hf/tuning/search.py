"""The search for the lambdas: a coarse grid around the automatic rule, then finer steps around the best pair."""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.utils.tqdm import tqdm
from transformers import PreTrainedModel

from neuromerge_hf.config import is_number
from neuromerge_hf.errors import MergeError
from neuromerge_hf.methods.neuromerging import NeuroMerging
from neuromerge_hf.tuning.components import LambdaComponents
from neuromerge_hf.tuning.evaluation import Scores
from neuromerge_hf.tuning.trials import Trial

DIGITS = 4
"""The significant digits of the lambdas that are tried, except the automatic rule's own."""


@dataclass(frozen=True)
class TuningGrid:
    """The lambdas to try: first all pairs of these values, then finer steps around the best pair.

    Args:
        parallel: values of lambda_1.
        orthogonal: values of lambda_2, as multiples of the automatic rule's 1 / (1 - sigma).
        rounds: how often the steps are halved around the best pair; each adds up to 8 candidates.

    Examples:
        >>> TuningGrid(parallel=(0.0,), orthogonal=(0.8, 1.0, 1.2), rounds=0).rounds
        0
    """

    parallel: Sequence[float] = (0.0, 0.5, 1.0)
    orthogonal: Sequence[float] = (0.4, 0.6, 0.8, 1.0, 1.2)
    rounds: int = 1

    def __post_init__(self) -> None:
        for name in ("parallel", "orthogonal"):
            values = getattr(self, name)
            if not isinstance(values, list | tuple) or not all(map(is_number, values)):
                raise MergeError(f"{name} of a TuningGrid must be a list of finite numbers, not {values!r:.200}.")
        if not isinstance(self.rounds, int):
            raise MergeError(f"rounds of a TuningGrid must be a whole number, not {self.rounds!r:.200}.")
        if not self.parallel or not self.orthogonal or self.rounds < 0:
            raise MergeError(f"{self} has no candidates: give at least one value of each lambda, and rounds >= 0.")


class Search:
    """Tries candidates on one live model. `trials` records them, and `seconds` the time of their evaluation."""

    def __init__(
        self,
        parts: LambdaComponents,
        evaluate: Callable[[PreTrainedModel], Scores],
        metric: str | None,
        greater_is_better: bool,
        kwargs: dict[str, Any],
    ):
        self.trials: list[Trial] = []
        self.seconds = 0.0
        self._parts = parts
        self._evaluate = evaluate
        self._metric = metric
        self._sign = 1 if greater_is_better else -1
        self._kwargs = kwargs
        self._model: PreTrainedModel | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The live model. It is loaded when it is first used, which must be after the parts are computed."""
        if self._model is None:
            self._model = self._parts.load_base(**self._kwargs)
        return self._model

    @property
    def best(self) -> Trial:
        """The first trial with the best score, so that the automatic rule wins a tie."""
        return max(self.trials, key=lambda trial: self._sign * trial.score)

    def run(self, density: float, fitted: NeuroMerging, grid: TuningGrid) -> None:
        """At one density, try the automatic rule, the grid, and then finer steps around the best pair."""
        rule = 1 / (1 - fitted.sigma)
        first = [(0.0, rule), (fitted.config.lambda_parallel, fitted.lambda_orthogonal)]
        multiples = [rule if multiple == 1 else float(f"{multiple * rule:.{DIGITS}g}") for multiple in grid.orthogonal]
        tried: dict[tuple[float, float], Trial] = {}

        def try_all(candidates: Iterable[tuple[float, float]]) -> None:
            new = [pair for pair in dict.fromkeys(candidates) if pair not in tried]
            for pair in tqdm(new, desc=f"Tuning at density {density:g}", name="neuromerge_hf.tuning"):
                tried[pair] = self._try(density, *pair, is_rule=pair == first[0])

        try_all([*first, *itertools.product(grid.parallel, multiples)])
        for _ in range(grid.rounds):
            best = max(tried.values(), key=lambda trial: self._sign * trial.score)
            around_parallel = around(best.lambda_parallel, [pair[0] for pair in tried])
            around_orthogonal = around(best.lambda_orthogonal, [pair[1] for pair in tried])
            try_all(itertools.product(around_parallel, around_orthogonal))

    def _try(self, density: float, parallel: float, orthogonal: float, *, is_rule: bool) -> Trial:
        self._parts.set_lambdas(self.model, parallel, orthogonal)
        started = time.perf_counter()
        with torch.no_grad():
            scores = self._evaluate(self.model)
        self.seconds += time.perf_counter() - started
        self.model.eval()
        if self._metric is not None and self._metric not in scores.tasks:
            raise MergeError(f"metric={self._metric!r} is not among what was evaluated: {', '.join(scores.tasks)}.")
        score = scores.average if self._metric is None else scores.tasks[self._metric]
        trial = Trial(density, parallel, orthogonal, score, scores.tasks, is_rule)
        self.trials.append(trial)
        return trial


def around(value: float, tried: Iterable[float]) -> list[float]:
    """A value, and those half way to the nearest tried values below and above it.

    If nothing was tried on one side, the step is the same as on the other side.
    """
    below = [value - other for other in tried if other < value]
    above = [other - value for other in tried if other > value]
    if not below and not above:
        return [value]
    down, up = min(below or above), min(above or below)
    return [value, float(f"{value - down / 2:.{DIGITS}g}"), float(f"{value + up / 2:.{DIGITS}g}")]
