"""TIES-Merging (Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023,
arXiv:2306.01708): trim each task vector over the whole model, elect a sign for each entry, and take the mean of the
entries that have it.

Where the trimmed entries sum to exactly 0, no sign is elected and the base stays, as the paper's algorithm has it. (The
authors' code takes the majority sign of the whole model there, other tools the positive one.)
"""

from collections.abc import Callable

import torch
from torch import Tensor

from neuromerge_hf.config import TIESConfig
from neuromerge_hf.engine.method import Method, Recorder, add_change, summed
from neuromerge_hf.engine.thresholds import find_trimmings
from neuromerge_hf.methods.neuromerging import trim_block
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.layout import Block


def elect_sign(task_vectors: Tensor) -> Tensor:
    """The sign (-1, 0, 1) with the larger total magnitude, entry by entry: (...) from trimmed (T, ...) float32."""
    return summed(task_vectors).sign_()


def disjoint_mean(task_vectors: Tensor, sign: Tensor) -> Tensor:
    """The mean of the entries that have the elected sign; 0 where there is none.

    Args:
        task_vectors: (T, ...) float32, trimmed.
        sign: (...) float32, see `elect_sign`.
    """
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for task_vector in task_vectors:
        agreeing = (task_vector * sign).clamp_(min=0)
        total += agreeing
        count += agreeing > 0
    return total.div_(count.clamp_(min=1)).mul_(sign)


class TIES(Method[TIESConfig]):
    """TIES-Merging with the thresholds of a plan."""

    @classmethod
    def fit(
        cls, config: TIESConfig, plan: MergePlan, device: torch.device, threads: int, advance: Callable[[int], object]
    ) -> "TIES":
        return cls(config, find_trimmings(plan, config.density, device, threads, advance))

    def merge_block(self, x: Tensor, unit: Unit, block: Block, record: Recorder) -> Tensor:
        trim_block(x, unit, [trimming.threshold for trimming in self.trimmings])
        change = disjoint_mean(x[1:], elect_sign(x[1:]))
        return add_change(x[0], change.mul_(self.config.scale))
