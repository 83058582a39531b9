"""Simple averaging: the mean of the experts' weights. An expert without a change of a parameter counts as the base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from neuromerge_hf.config import MergeConfig
from neuromerge_hf.engine.method import Method, Recorder, add_change, summed

if TYPE_CHECKING:
    from torch import Tensor

    from neuromerge_hf.sources.unit import Unit
    from neuromerge_hf.storage.layout import Block


@dataclass(frozen=True)
class AverageConfig(MergeConfig):
    """Simple averaging: the mean of the experts' weights.

    Args:
        exclude: names of parameters to copy from the base, as shell patterns.

    Example:
        >>> merge(["math", "code-lora"], "merged", base_model="base", config=AverageConfig()).method
        'average'
    """

    method = "average"
    title = "averaging"
    paper = "https://arxiv.org/abs/2203.05482"
    summary = "Every weight is the mean of the fine-tunes' weights."


def average(task_vectors: Tensor, experts: int) -> Tensor:
    """Return the mean of the task vectors of all experts: (...) float32.

    Args:
        task_vectors: (T, ...) float32, the task vectors of the experts that change the parameter.
        experts: the number of all experts.
    """
    return summed(task_vectors).div_(experts)


class Average(Method[AverageConfig], config=AverageConfig):
    """Simple averaging of the experts."""

    def merge_block(self, x: Tensor, unit: Unit, block: Block, record: Recorder) -> Tensor:
        return add_change(x[0], average(x[1:], len(unit.task_vectors)))
