"""Task Arithmetic (Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv:2212.04089)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from neuromerge_hf.config import WeightedConfig, check_number
from neuromerge_hf.engine.method import Method, Recorder, add_change, summed, weigh_block
from neuromerge_hf.options import option

if TYPE_CHECKING:
    from torch import Tensor

    from neuromerge_hf.sources.unit import Unit
    from neuromerge_hf.storage.layout import Block


@dataclass(frozen=True)
class TaskArithmeticConfig(WeightedConfig):
    """The hyper-parameters of Task Arithmetic (Ilharco et al., arXiv:2212.04089).

    Args:
        scale: the paper's lambda, the weight of the sum of the task vectors. 0.4 is common without validation data.
        weights: the weight of each expert's task vector in the sum, in their order; None for 1.
        exclude: names of parameters to copy from the base, as shell patterns.

    Examples:
        >>> merge(["math"], "merged", base_model="base", config=TaskArithmeticConfig(scale=0.3)).settings
        {'weights': None, 'scale': 0.3, 'exclude': []}
    """

    method = "task_arithmetic"
    title = "Task Arithmetic"
    paper = "https://arxiv.org/abs/2212.04089"
    summary = """\
Task Arithmetic (Ilharco et al., ICLR 2023) adds up what the fine-tunes changed in the base, their task vectors, and
gives the sum a weight."""

    scale: float = option(0.4, "the weight of the merged task vector")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("scale", self.scale)


def add_tasks(task_vectors: Tensor, scale: float) -> Tensor:
    """Return ``scale * sum_t tau_t`` (section 2 of the paper): (...) from `task_vectors` (T, ...) float32."""
    return summed(task_vectors).mul_(scale)


class TaskArithmetic(Method[TaskArithmeticConfig], config=TaskArithmeticConfig):
    """Task Arithmetic of the experts."""

    def merge_block(self, x: Tensor, unit: Unit, block: Block, record: Recorder) -> Tensor:
        weigh_block(x, unit, self.config)
        return add_change(x[0], add_tasks(x[1:], self.config.scale))
