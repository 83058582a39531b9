"""NeuroIso: a method of this library. Linear layers are merged by their spectrum, everything else by NeuroMerging.

The task vectors of a linear layer are added up, and all singular values of the sum are made equal within its numerical
rank, as in Iso-C (Marczak et al., arXiv:2502.04959). They become a fixed share of an expert's largest singular value:
that is about the strongest change of a direction which training has made, so it holds for adapters and full fine-tunes
alike (benchmarks/quality, "NeuroIso").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from neuromerge_hf.config import check_number
from neuromerge_hf.engine.trimming import Trimming
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
        scale: all singular values of a linear layer's merged change, as a share of the largest singular value of an
            expert's change. It is the mean over the experts that change the layer.
        exclude: names of parameters to copy from the base, as shell patterns.

    Example:
        >>> merge(["math", "code-lora"], "merged", base_model="base", config=NeuroIsoConfig(scale=0.3)).method
        'neuro_iso'
    """

    method = "neuro_iso"
    title = "NeuroIso"
    paper = "https://arxiv.org/abs/2502.04959"
    summary = """\
NeuroIso adds up what the fine-tunes changed in each linear layer, and makes all singular values of the sum equal, as in
Iso-C (Marczak et al., ICML 2025), at a share of an expert's largest one. Everything else is merged by NeuroMerging
(Fang et al., EMNLP 2025)."""
    citation = None
    by_matrix = True

    scale: float = option(0.4, "the weight of the merged task vector")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("scale", self.scale)

    def spectra(self, experts: int) -> int:
        return 1 + experts // 8  # the largest singular values take little time beside a spectrum


class NeuroIso(NeuroMerging, config=NeuroIsoConfig):
    """NeuroIso, with the thresholds of the experts and the lambdas for what is not merged by matrices."""

    config: NeuroIsoConfig

    @classmethod
    def fit(cls, config: NeuroMergingConfig, passes: Passes) -> NeuroMerging:
        if any(not unit.by_matrix for unit in passes.work.merged):
            return super().fit(config, passes)
        return cls(config, [Trimming(0.0, 0.0, entries) for entries in passes.work.entries], by_length=1.0)

    def find_change(self, matrix: Matrix) -> Factors:
        from neuromerge_hf.spectrum import flattened, spectral_norm

        largest = [spectral_norm(task_vector) for task_vector in matrix.task_vectors()]
        directions, _ = flattened(matrix.total())
        return directions.times(self.config.scale * sum(largest) / len(largest))
