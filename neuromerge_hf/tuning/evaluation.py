"""The user's own evaluation function, and the scores that it returns."""

import functools
import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from neuromerge_hf.errors import MergeError

Function = Callable[[Any], Any]
"""Takes a model and returns its score, a dictionary of scores by task, or one of lists of scores by example."""

Evaluate = Function | Mapping[str, Function]
"""One function, or a function for each expert by name, which takes the model with that expert's head."""

SINGLE_TASK = "score"
"""The name of the task if there is only one score."""


@dataclass(frozen=True)
class Scores:
    """The scores of one model.

    Attributes:
        tasks: the score of each task, which is the mean if there are scores by example.
        examples: the scores by example of each task that has them.
    """

    tasks: dict[str, float]
    examples: dict[str, list[float]] = field(default_factory=dict)

    @property
    def average(self) -> float:
        """The mean of the tasks' scores."""
        return math.fsum(self.tasks.values()) / len(self.tasks)


def run_evaluation(evaluate: Evaluate, model_with_head: Callable[[str | None], Any]) -> Scores:
    """Evaluate a model.

    Args:
        evaluate: the user's function, or one for each expert by name.
        model_with_head: returns the model with the head of the named expert, or without such a head for None.

    Returns:
        The scores.

    Raises:
        MergeError: if the function does not return finite scores, or an expert has no head.
    """
    if isinstance(evaluate, Mapping):
        returned: Any = {name: function(model_with_head(name)) for name, function in evaluate.items()}
    else:
        returned = evaluate(model_with_head(None))
    by_task = returned if isinstance(returned, Mapping) else {SINGLE_TASK: returned}
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
    """Import a function, or a dictionary of them, by ``module:function``. The current folder is searched as well.

    Raises:
        MergeError: if it cannot be imported, or is not a function.
    """
    module_name, _, name = place.partition(":")
    if not module_name or not name:
        raise MergeError(f"{place!r} names no function: write module:function, such as my_eval:accuracy.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # the user's own module may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise MergeError(f"{place} cannot be imported: {reason}. It is looked for in {os.getcwd()} as well.") from error
    check_evaluation(function, place)
    if isinstance(function, Mapping):
        return {name: _with_name_of(place, each) for name, each in function.items()}
    return _with_name_of(place, function)


def check_evaluation(evaluate: object, name: str = "evaluate") -> None:
    """Raise a `MergeError` unless the argument is a function, or a dictionary of functions by expert."""
    functions = evaluate.values() if isinstance(evaluate, Mapping) else [evaluate]
    if not functions or not all(map(callable, functions)):
        raise MergeError(f"{name} must be a function, or a dictionary of functions by expert, not {evaluate!r:.100}.")


def _with_name_of(place: str, function: Function) -> Function:
    """The function, with its own errors as a `MergeError`: on the command line they would look like this library's."""

    @functools.wraps(function)
    def named(model: Any) -> Any:
        try:
            return function(model)
        except MergeError:
            raise
        except Exception as error:
            raise MergeError(f"{place} failed with {type(error).__name__}: {error}.") from error

    return named


def name_of(evaluate: Evaluate) -> str:
    """The evaluation as ``module:function``, for messages, recipes and cards."""
    if isinstance(evaluate, Mapping):
        return ", ".join(dict.fromkeys(map(name_of, evaluate.values())))
    name = getattr(evaluate, "__qualname__", type(evaluate).__qualname__)
    return f"{getattr(evaluate, '__module__', None) or type(evaluate).__module__}:{name}"


def _number(value: Any) -> float:
    """A number, or a tensor or array without dimensions, as float; NaN for anything else."""
    with suppress(OverflowError):
        return float(value) if isinstance(value, Real) or getattr(value, "shape", None) == () else math.nan
    return math.nan


def _is_list(value: object) -> bool:
    return (isinstance(value, Sequence) and not isinstance(value, str | bytes)) or len(getattr(value, "shape", ())) == 1
