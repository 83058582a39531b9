"""NeuroIso: a method of this library. Linear layers are merged by their spectrum, everything else by NeuroMerging.

The task vectors of a linear layer are added up, and the singular values of the sum are made equal within its numerical
rank, as in Iso-C (Marczak et al., arXiv:2502.04959).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from neuromerge_hf.config import is_number
from neuromerge_hf.errors import MergeError
from neuromerge_hf.methods.neuromerging import NeuroMerging, NeuroMergingConfig
from neuromerge_hf.options import option

if TYPE_CHECKING:
    from neuromerge_hf.engine.matrices import Matrix
    from neuromerge_hf.engine.passes import Passes
    from neuromerge_hf.spectrum import Factors


@dataclass(frozen=True)
class NeuroIsoConfig(NeuroMergingConfig):
    """The hyper-parameters of NeuroIso.

    Args:
        density: as in `NeuroMergingConfig`, for everything but linear layers.
        lambda_parallel: likewise.
        lambda_orthogonal: likewise.
        scale: the weight of the merged change of linear layers, in mean singular values of their task vectors' sum.
            "auto" keeps the length of the sum: the singular values become their root mean square.
        exclude: names of parameters to copy from the base, as shell patterns.

    Example:
        >>> merge(["math", "code-lora"], "merged", base_model="base", config=NeuroIsoConfig()).method
        'neuro_iso'
    """

    method = "neuro_iso"
    title = "NeuroIso"
    paper = "https://arxiv.org/abs/2502.04959"
    summary = """\
NeuroIso adds up what the fine-tunes changed in each linear layer, and makes all singular values of the sum equal, as in
Iso-C (Marczak et al., ICML 2025). Everything else is merged by NeuroMerging (Fang et al., EMNLP 2025)."""
    by_matrix = True

    scale: float | Literal["auto"] = option("auto", "the weight of the change of linear layers: a number, auto (ours)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale != "auto" and not is_number(self.scale):
            raise MergeError(f'scale must be "auto" or a finite number, not {self.scale!r}.')


class NeuroIso(NeuroMerging, config=NeuroIsoConfig):
    """NeuroIso, fitted to what is not merged by matrices."""

    config: NeuroIsoConfig

    @classmethod
    def fit(cls, config: NeuroMergingConfig, passes: Passes) -> NeuroMerging:
        others = tuple(unit for unit in passes.work.units if not unit.by_matrix)
        work = dataclasses.replace(passes.work, units=others)
        return super().fit(config, dataclasses.replace(passes, work=work))

    def find_change(self, matrix: Matrix) -> Factors:
        from neuromerge_hf.spectrum import flattened

        directions, values = flattened(matrix.total())
        if not len(values):
            return directions.times(0.0)
        if self.config.scale == "auto":
            return directions.times(values.square().mean().sqrt().item())
        return directions.times(self.config.scale * values.mean().item())
