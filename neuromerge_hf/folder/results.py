"""Measurements of a merged model, its base and its experts."""

import math
import numbers
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
    """

    model: str
    task: str
    metric: str
    value: float
    task_type: str | None = None
    dataset: str | None = None
    split: str | None = None
    greater_is_better: bool = True

    @property
    def measured(self) -> tuple[str, str, str | None]:
        """The task, metric and split. Results of different models are compared if these are the same."""
        return self.task, self.metric, self.split


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
        raise MergeError(f"{entry!r} is no result: it needs model, task, metric and value, and may have {known[4:]}.")
    return Result(**entry)
