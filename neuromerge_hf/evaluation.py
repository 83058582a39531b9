"""The user's own evaluation of models, and what it returns."""

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from neuromerge_hf.errors import MergeError

Evaluate = Callable[[Any], Any]
"""Takes a model and returns its score, or a dictionary of scores by task, or one of lists of scores by example."""

ONLY = "score"
"""The name of the task where there is only one score."""


@dataclass(frozen=True)
class Scores:
    """What an evaluation found.

    Attributes:
        tasks: the score of each task; of lists, their mean.
        examples: the scores by example, of the tasks that have them.
    """

    tasks: dict[str, float]
    examples: dict[str, list[float]] = field(default_factory=dict)

    @property
    def average(self) -> float:
        """The mean over the tasks."""
        return math.fsum(self.tasks.values()) / len(self.tasks)


def run_evaluation(evaluate: Evaluate, model: Any) -> Scores:
    """Evaluate a model.

    Raises:
        MergeError: if what is returned are no finite scores.
    """
    returned = evaluate(model)
    by_task = returned if isinstance(returned, Mapping) else {ONLY: returned}
    tasks, examples = {}, {}
    for task, value in by_task.items():
        if _is_list(value):
            examples[task] = [_number(each) for each in value]
            tasks[task] = math.fsum(examples[task]) / len(examples[task]) if examples[task] else math.nan
        else:
            tasks[task] = _number(value)
    if not tasks or not all(isinstance(task, str) and math.isfinite(score) for task, score in tasks.items()):
        raise MergeError(
            f"{name_of(evaluate)} must return a finite number, or a dictionary of them by task, or one of lists of "
            f"them by example, not {returned!r:.200}."
        )
    return Scores(tasks, examples)


def load_function(place: str) -> Evaluate:
    """The function that ``module:function`` names; modules are looked for in the current folder as well.

    Raises:
        MergeError: if it cannot be imported.
    """
    module_name, _, name = place.partition(":")
    if not module_name or not name:
        raise MergeError(f"{place!r} names no function: write module:function, such as my_eval:accuracy.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise MergeError(f"{place} cannot be imported: {error}. It is looked for in {os.getcwd()} as well.") from error
    if not callable(function):
        raise MergeError(f"{place} is not a function, but {function!r:.100}.")
    return function  # type: ignore[no-any-return]


def name_of(evaluate: Evaluate) -> str:
    """``module:function``, for messages and for what is written down."""
    name = getattr(evaluate, "__qualname__", type(evaluate).__qualname__)
    return f"{getattr(evaluate, '__module__', None) or type(evaluate).__module__}:{name}"


def _number(value: Any) -> float:
    """A number, or a tensor or array of one, as float; NaN for anything else."""
    return float(value) if isinstance(value, Real) or getattr(value, "shape", None) == () else math.nan


def _is_list(value: object) -> bool:
    return (isinstance(value, Sequence) and not isinstance(value, str | bytes)) or len(getattr(value, "shape", ())) == 1
