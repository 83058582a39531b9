"""Measurements of a merged model, of its base and of its experts."""

import json
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from neuromerge_hf.errors import MergeError

MERGED, BASE = "merged", "base"


@dataclass(frozen=True)
class Result:
    """A measurement.

    Attributes:
        model: "merged", "base", or the name of an expert.
        task: what was measured, in words.
        metric: its name.
        value: a finite number.
        task_type: the Hub's name of the task ("text-classification"), if it is not that of the merged model's class.
        dataset: the id on the Hub of the data set, if it is there.
        split: of the data set.
        greater_is_better: false for a loss.
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
        """What was measured: results of several models are compared where this is the same."""
        return self.task, self.metric, self.split


def check_results(results: Iterable[Result | Mapping[str, Any]], experts: Sequence[str]) -> list[Result]:
    """The results, as plain Python values.

    Args:
        results: or the same as dictionaries, from a JSON file.
        experts: the names of the merge's experts.

    Raises:
        MergeError: if an entry is incomplete, is no finite number, or is of a model that is not in the merge.
    """
    if isinstance(results, Mapping | str):
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
    """The entries of a JSON file, for `MergeReport.add_results`.

    Raises:
        MergeError: if it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MergeError(f"The results {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise MergeError(f"The results {path} are not JSON: {error}.") from error


def _checked(result: Result | Mapping[str, Any], experts: Sequence[str]) -> Result:
    if not isinstance(result, Result):
        result = _from_mapping(result)
    texts = {name: getattr(result, name) for name in ("model", "task", "metric")}
    for name, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise MergeError(f"{result} needs a text as its {name}.")
    value = getattr(result.value, "item", lambda: result.value)()  # numpy's and torch's scalars
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise MergeError(f"The value of {result} is not a finite number. Leave it out.")
    if result.model not in (MERGED, BASE, *experts):
        raise MergeError(
            f"{result} is of a model that is not in this merge. Its models are: {', '.join([MERGED, BASE, *experts])}."
        )
    return Result(
        **texts,
        value=float(value),
        task_type=result.task_type,
        dataset=result.dataset,
        split=result.split,
        greater_is_better=bool(result.greater_is_better),
    )


def _from_mapping(entry: Any) -> Result:
    known = [field.name for field in fields(Result)]
    if not isinstance(entry, Mapping) or not {"model", "task", "metric", "value"} <= entry.keys() <= set(known):
        raise MergeError(f"{entry!r} is no result: it needs model, task, metric and value, and may have {known[4:]}.")
    return Result(**entry)
