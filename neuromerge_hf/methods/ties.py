"""TIES-Merging (Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023,
arXiv:2306.01708): trim each task vector over the whole model, elect a sign for each entry, and take the mean of the
entries with this sign.

If the trimmed entries sum to exactly 0, no sign is elected and the base's entry is kept, as in the paper's algorithm.
(The authors' code takes the majority sign of the whole model instead, and other tools take the positive sign.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from neuromerge_hf.config import WeightedConfig, check_density, check_number
from neuromerge_hf.engine.method import Method, Recorder, add_change, summed, trim_block, weigh_block
from neuromerge_hf.options import option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from neuromerge_hf.engine.passes import Passes
    from neuromerge_hf.sources.unit import Unit
    from neuromerge_hf.storage.layout import Block


@dataclass(frozen=True)
class TIESConfig(WeightedConfig):
    """The hyper-parameters of TIES-Merging (Yadav et al., arXiv:2306.01708).

    The defaults are the paper's choice without validation data.

    Args:
        density: the fraction of each task vector's entries that is kept: the largest magnitudes of the whole model.
        scale: the paper's lambda, the weight of the merged task vector.
        weights: the weight of each expert's vote and of its entries in the mean, in their order; None for equal ones.
        exclude: names of parameters to copy from the base, as shell patterns.

    Examples:
        >>> merge(["math"], "merged", base_model="base", config=TIESConfig(density=0.3)).density
        0.3
    """

    method = "ties"
    title = "TIES-Merging"
    paper = "https://arxiv.org/abs/2306.01708"
    summary = """\
TIES-Merging (Yadav et al., NeurIPS 2023) takes what each fine-tune changed in the base, its task vector, and keeps the
largest entries of it. It elects a sign for each entry, and takes the mean over the fine-tunes that have it."""

    density: float = option(0.2, "the fraction of each task vector that is kept")
    scale: float = option(1.0, "the weight of the merged task vector")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self.density)
        check_number("scale", self.scale)

    @property
    def passes(self) -> int:
        return 1 if self.density == 1 else 2


def elect_sign(task_vectors: Tensor) -> Tensor:
    """Return each entry's sign (-1, 0, 1) with the larger total magnitude: (...) from trimmed (T, ...) float32."""
    return summed(task_vectors).sign_()


def disjoint_mean(task_vectors: Tensor, sign: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the mean of the entries with the elected sign, or 0 if there are none: (...) float32.

    Args:
        task_vectors: (T, ...) float32, trimmed, times the weights.
        sign: (...) float32, the elected signs; see `elect_sign`.
        weights: the weights of the T task vectors, above 0.
    """
    total, count = sign.new_zeros(sign.shape), sign.new_zeros(sign.shape)
    for task_vector, weight in zip(task_vectors, weights, strict=True):
        agreeing = (task_vector * sign).clamp_(min=0)
        total += agreeing
        count.add_(agreeing > 0, alpha=weight)
    return total.div_(count.clamp_(min=min(weights))).mul_(sign)


class TIES(Method[TIESConfig], config=TIESConfig):
    """TIES-Merging with the thresholds of the experts."""

    @classmethod
    def fit(cls, config: TIESConfig, passes: Passes) -> TIES:
        from neuromerge_hf.engine.thresholds import find_trimmings

        return cls(config, find_trimmings(passes, config.density))

    def merge_block(self, x: Tensor, unit: Unit, block: Block, record: Recorder) -> Tensor:
        trim_block(x, unit, [trimming.threshold for trimming in self.trimmings])
        weights = weigh_block(x, unit, self.config)
        change = disjoint_mean(x[1:], elect_sign(x[1:]), weights)
        return add_change(x[0], change.mul_(self.config.scale))
