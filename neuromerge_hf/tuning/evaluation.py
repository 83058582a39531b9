"""The user's own evaluation of models, and what it returns."""

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedModel

from neuromerge_hf.errors import MergeError
from neuromerge_hf.storage.files import HEAD_WEIGHTS

Function = Callable[[Any], Any]
"""Takes a model and returns its score, or a dictionary of scores by task, or one of lists of scores by example."""

Evaluate = Function | Mapping[str, Function]
"""Or a function for each expert, by name, which gets the model under that expert's head, and returns its score."""

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


def run_evaluation(evaluate: Evaluate, model: Any, heads: Path) -> Scores:
    """Evaluate a model.

    Args:
        heads: the folder of the experts' heads.

    Raises:
        MergeError: if what is returned are no finite scores, or an expert has no head.
    """
    if isinstance(evaluate, Mapping):
        returned: Any = {name: function(with_head(model, heads, name)) for name, function in evaluate.items()}
    else:
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


def with_head(model: PreTrainedModel, heads: Path, name: str) -> PreTrainedModel:
    """An expert's task model around the weights of a merged one, which the two share.

    Raises:
        MergeError: if there is no head of this name.
    """
    folder = heads / name
    if not folder.is_dir():
        found = sorted(path.name for path in heads.iterdir()) if heads.is_dir() else []
        raise MergeError(f"No expert {name!r} has a head of its own to be evaluated with; there are: {found}.")
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        task_model = getattr(transformers, config.architectures[0])(config)
    setattr(task_model, task_model.base_model_prefix, model.base_model)
    head = load_file(folder / HEAD_WEIGHTS)
    own = {key: tensor.to(model.device, model.dtype) for key, tensor in head.items()}
    task_model.load_state_dict(own, strict=False, assign=True)
    evaluated: PreTrainedModel = task_model.eval()
    return evaluated


def load_function(place: str) -> Evaluate:
    """What ``module:function`` names: a function, or a dictionary of them. The current folder is searched as well.

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
    if not callable(function) and not isinstance(function, Mapping):
        raise MergeError(f"{place} is not a function, but {function!r:.100}.")
    return function


def name_of(evaluate: Evaluate) -> str:
    """``module:function``, for messages and for what is written down."""
    if isinstance(evaluate, Mapping):
        return ", ".join(dict.fromkeys(map(name_of, evaluate.values())))
    name = getattr(evaluate, "__qualname__", type(evaluate).__qualname__)
    return f"{getattr(evaluate, '__module__', None) or type(evaluate).__module__}:{name}"


def _number(value: Any) -> float:
    """A number, or a tensor or array of one, as float; NaN for anything else."""
    return float(value) if isinstance(value, Real) or getattr(value, "shape", None) == () else math.nan


def _is_list(value: object) -> bool:
    return (isinstance(value, Sequence) and not isinstance(value, str | bytes)) or len(getattr(value, "shape", ())) == 1
