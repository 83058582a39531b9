"""Measurements of a merged model, its base and its experts."""

import math
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from neuromerge_hf.errors import MergeError
from neuromerge_hf.storage.documents import load_json
from neuromerge_hf.typed import check_fields

MERGED, BASE = "merged", "base"


@dataclass(frozen=True)
class Result:
    """A measurement of one model.

    Attributes:
        model: "merged", "base", or the name of an expert.
        task: a short description of the task.
        metric: the name of the metric.
        value: the measured value, a finite number.
        task_type: the Hub's name of the task ("text-classification"); None for the task of the merged model's class.
        dataset: the id of the data set on the Hub; None if it is not there.
        split: the split of the data set.
        greater_is_better: whether greater values are better; false for a loss.
        benchmark_task: the task's id in the data set's ``eval.yaml``, if the data set is a benchmark on the Hub. A push
            then reports the result to the benchmark (in ``.eval_results/``).
    """

    model: str
    task: str
    metric: str
    value: float
    task_type: str | None = None
    dataset: str | None = None
    split: str | None = None
    greater_is_better: bool = True
    benchmark_task: str | None = None

    @property
    def measured(self) -> tuple[str, str, str | None]:
        """The task, metric and split. Results of different models are compared if these are the same."""
        return self.task, self.metric, self.split


@dataclass(frozen=True)
class Comparison:
    """The results of one measurement: the merged model's beside those of the base and of the experts.

    Attributes:
        task: the task, as in `Result`; likewise `metric` and `split`.
        results: the result of each model, by "merged", "base", or the name of an expert.
    """

    task: str
    metric: str
    split: str | None
    results: Mapping[str, Result]

    @property
    def experts(self) -> dict[str, Result]:
        """The results of the experts."""
        return {name: result for name, result in self.results.items() if name not in (MERGED, BASE)}

    @property
    def merged(self) -> Result:
        """The result of the merged model.

        Raises:
            KeyError: if it was not measured.
        """
        return self.results[MERGED]

    @property
    def retained(self) -> float | None:
        """The merged model's value divided by that of the best expert; None if they cannot be compared."""
        return self._share(MERGED)

    @property
    def share_of_base(self) -> float | None:
        """The base's value divided by that of the best expert; None if they cannot be compared."""
        return self._share(BASE)

    def _share(self, model: str) -> float | None:
        best = max((result.value for result in self.experts.values()), default=0.0)
        found = self.results.get(model)
        if found is None or best <= 0 or found.value < 0 or not found.greater_is_better:
            return None
        return found.value / best


def comparisons(results: Iterable[Result]) -> list[Comparison]:
    """Group results by what was measured, in their order."""
    found: dict[tuple[str, str, str | None], dict[str, Result]] = {}
    for result in results:
        found.setdefault(result.measured, {})[result.model] = result
    return [Comparison(*measured, models) for measured, models in found.items()]


SHARES = re.compile(r"(^|[^a-z])(acc|accuracy|f1|precision|recall|exact.?match|em|auc)($|[^a-z])", re.IGNORECASE)
"""Metrics that are shares of 1 or of 100, by their names."""


def check_scales(results: Iterable[Result]) -> None:
    """Check that the values of one metric are all shares of 1 or all shares of 100.

    Raises:
        MergeError: if they are not.
    """
    by_metric: dict[str, list[Result]] = {}
    for result in results:
        if SHARES.search(result.metric) and result.value != 0:
            by_metric.setdefault(result.metric, []).append(result)
    for metric, found in by_metric.items():
        small = [result for result in found if abs(result.value) <= 1]
        large = [result for result in found if abs(result.value) > 1]
        if small and large:
            raise MergeError(
                f"The results of {metric} are on two scales: {large[0].value:g} of {large[0].model} on "
                f"{large[0].task!r}, and {small[0].value:g} of {small[0].model} on {small[0].task!r}. Give all of them "
                f"as shares of 1."
            )


def check_results(results: Iterable[Result | Mapping[str, Any]], experts: Sequence[str]) -> list[Result]:
    """Check results and convert their values to plain Python numbers.

    Args:
        results: the results, or dictionaries with their fields, such as the entries of a JSON file.
        experts: the names of the merge's experts.

    Raises:
        MergeError: if an entry is incomplete, its value is not a finite number, or its model is not in the merge.
    """
    if isinstance(results, Mapping | str) or not isinstance(results, Iterable):
        raise MergeError("The results must be a list: of Result, or of dictionaries with its fields.")
    checked, problems = [], []
    for result in results:
        try:
            checked.append(_checked(result, experts))
        except MergeError as error:
            problems += error.problems
    if problems:
        raise MergeError(problems)
    return checked


def load_results(path: Path) -> list[Any]:
    """Read the entries of a JSON file, for `add_results`.

    Raises:
        MergeError: if the file cannot be read or is not JSON.
    """
    results: list[Any] = load_json(path, list)
    return results


def _checked(result: Result | Mapping[str, Any], experts: Sequence[str]) -> Result:
    if not isinstance(result, Result):
        result = _from_mapping(result)
    texts = {name: getattr(result, name) for name in ("model", "task", "metric")}
    for name, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise MergeError(f"{result} needs a text as its {name}.")
    value = getattr(result.value, "item", lambda: result.value)()  # scalars of numpy and torch
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not _is_finite(value):
        raise MergeError(f"The value of {result} is not a finite number. Leave it out.")
    if result.model not in (MERGED, BASE, *experts):
        raise MergeError(
            f"{result} is of a model that is not in this merge. Its models are: {', '.join([MERGED, BASE, *experts])}."
        )
    checked = Result(
        **texts,
        value=float(value),
        task_type=result.task_type,
        dataset=result.dataset,
        split=result.split,
        greater_is_better=bool(result.greater_is_better),
        benchmark_task=result.benchmark_task,
    )
    check_fields(checked)
    return checked


def _is_finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _from_mapping(entry: Any) -> Result:
    known = [field.name for field in fields(Result)]
    if not isinstance(entry, Mapping) or not {"model", "task", "metric", "value"} <= entry.keys() <= set(known):
        raise MergeError(
            f"{entry!r} cannot be read: each result needs model, task, metric and value, and may have "
            f"{', '.join(known[4:])}."
        )
    return Result(**entry)
