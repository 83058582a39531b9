"""Averaging: the mean of the experts' weights. An expert without a change of a parameter counts as the base.

Shares that sum to 1 make ``theta_0 + sum_t w_t tau_t`` the weighted mean of the experts' own weights. So the average
of a training's checkpoints (Izmailov et al., arXiv:1803.05407) does not depend on the base. Of LoRA adapters it is the
mean of the products ``B A``, which differs from the product of the factors' means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from neuromerge_hf.config import WeightedConfig
from neuromerge_hf.engine.method import Method, Recorder, add_change, summed, weigh_block

if TYPE_CHECKING:
    from torch import Tensor

    from neuromerge_hf.sources.unit import Unit
    from neuromerge_hf.storage.layout import Block


@dataclass(frozen=True)
class AverageConfig(WeightedConfig):
    """Averaging: the mean of the experts' weights.

    Args:
        weights: the weight of each expert, in their order; None for equal weights. They are divided by their sum. Heads
            that are merged (`merge_heads`), and the rows of tokens that the base lacks, have the same weights.
        exclude: names of parameters to copy from the base, as shell patterns.

    Examples:
        >>> config = AverageConfig(weights=(1, 3))
        >>> merge(["math", "code-lora"], "merged", base_model="base", config=config).settings
        {'weights': [1, 3], 'exclude': []}
    """

    method = "average"
    title = "averaging"
    paper = "https://arxiv.org/abs/2203.05482"
    summary = "Every weight is the mean of the fine-tunes' weights, or their weighted mean."


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
        weigh_block(x, unit, self.config)
        return add_change(x[0], average(x[1:], sum(self.config.expert_weights(len(unit.task_vectors)))))
