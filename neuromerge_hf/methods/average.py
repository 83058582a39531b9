"""Averaging: the mean of the experts' weights. An expert without a change of a parameter counts as the base.

Shares that sum to 1 make ``theta_0 + sum_t w_t tau_t`` the weighted mean of the experts' own weights. So the average
of a training's checkpoints (Izmailov et al., arXiv:1803.05407) does not depend on the base. Of LoRA adapters it is the
mean of the products ``B A``, which differs from the product of the factors' means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from neuromerge_hf.config import MergeConfig, check_weights
from neuromerge_hf.engine.method import Method, Recorder, add_change, summed
from neuromerge_hf.errors import MergeError
from neuromerge_hf.options import option

if TYPE_CHECKING:
    from torch import Tensor

    from neuromerge_hf.sources.unit import Unit
    from neuromerge_hf.storage.layout import Block


def parse_weights(text: str) -> tuple[float, ...]:
    """Return the weights in "0.2,0.3,0.5"."""
    return tuple(float(number) for number in text.split(","))


@dataclass(frozen=True)
class AverageConfig(MergeConfig):
    """Averaging: the mean of the experts' weights.

    Args:
        weights: the weight of each expert, in their order; None for equal weights. They are divided by their sum. Heads
            that are merged (`merge_heads`), and the rows of tokens that the base lacks, have the same weights.
        exclude: names of parameters to copy from the base, as shell patterns.

    Example:
        >>> config = AverageConfig(weights=(1, 3))
        >>> merge(["math", "code-lora"], "merged", base_model="base", config=config).settings
        {'weights': [1, 3], 'exclude': []}
    """

    method = "average"
    title = "averaging"
    paper = "https://arxiv.org/abs/2203.05482"
    summary = "Every weight is the mean of the fine-tunes' weights, or their weighted mean."

    weights: tuple[float, ...] | None = option(
        None,
        "the weight of each expert in the mean",
        shown="equal weights",
        command_line={"parser": parse_weights, "metavar": "<float,float,...>"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None:
            object.__setattr__(self, "weights", check_weights("weights", self.weights))

    def expert_weights(self, experts: int) -> tuple[float, ...]:
        if self.weights is None:
            return super().expert_weights(experts)
        if len(self.weights) != experts:
            raise MergeError(
                f"weights has {len(self.weights)} entries ({', '.join(f'{weight:g}' for weight in self.weights)}), but "
                f"there are {experts} experts. Give one for each, in their order."
            )
        return self.weights


def average(task_vectors: Tensor, total: float) -> Tensor:
    """Return the mean of the task vectors of all experts: (...) float32.

    Args:
        task_vectors: (T, ...) float32, the task vectors of the experts that change the parameter, times their weights.
        total: the sum of the weights of all experts, which is their number if all weights are 1.
    """
    return summed(task_vectors).div_(total)


class Average(Method[AverageConfig], config=AverageConfig):
    """The mean of the experts."""

    def merge_block(self, x: Tensor, unit: Unit, block: Block, record: Recorder) -> Tensor:
        weights = self.config.expert_weights(len(unit.task_vectors))
        for task_vector, expert in zip(x[1:], unit.changing, strict=True):
            task_vector.mul_(weights[expert])
        return add_change(x[0], average(x[1:], sum(weights)))
