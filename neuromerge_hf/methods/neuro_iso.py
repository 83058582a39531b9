"""NeuroIso: a method of this library. Linear layers are merged by their spectrum, everything else by NeuroMerging.

The task vectors of a linear layer are added up: ``U S V^T``. Iso-C (Marczak et al., arXiv:2502.04959) makes all
singular values of the sum equal, so that no task's strong directions hide another's. That is right for many tasks, and
too much for two. The new singular values lie between these ends, by a rule for adapters and full fine-tunes alike:

    a * (p * s / s_1 + (1 - p) * scale),    p = 2^(-(T - 1)^2)

``a`` is the mean over the experts of the largest singular value of their task vector, ``s_1`` the largest one of the
sum, and ``T`` the effective number of experts: ``(tr G)^2 / tr G^2`` of the Gram matrix G of their task vectors. It is
the number of experts if their task vectors are orthogonal and have one length, and 1 if they are equal: then the merged
change is theirs. From three experts on, almost all that is left is ``a * scale`` (benchmarks/quality, "NeuroIso").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from neuromerge_hf.config import check_number
from neuromerge_hf.engine.trimming import Trimming
from neuromerge_hf.methods.iso_c import CITATION as ISO_CITATION
from neuromerge_hf.methods.neuromerging import CITATION, NeuroMerging, NeuroMergingConfig
from neuromerge_hf.options import option

if TYPE_CHECKING:
    from torch import Tensor

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
        scale: what the singular values of a linear layer's merged change become with many experts, as a share of the
            largest singular value of an expert's change, on average over the experts that change the layer.
        exclude: names of parameters to copy from the base, as shell patterns.

    Examples:
        >>> merge(["math", "code-lora"], "merged", base_model="base", config=NeuroIsoConfig(scale=0.3)).method
        'neuro_iso'
    """

    method = "neuro_iso"
    title = "NeuroIso"
    paper = "https://arxiv.org/abs/2502.04959"
    summary = """\
NeuroIso adds up what the fine-tunes changed in each linear layer, and makes the singular values of the sum more equal
the more fine-tunes there are, which takes up Iso-C (Marczak et al., ICML 2025). Everything else is merged by
NeuroMerging (Fang et al., EMNLP 2025)."""
    citation = f"{CITATION}\n{ISO_CITATION}"
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
        from neuromerge_hf.spectrum import spectral_norm, with_spectrum

        largest = [spectral_norm(task_vector) for task_vector in matrix.task_vectors()]
        strength, share = sum(largest) / len(largest), 2.0 ** -((effective_number(matrix.products()) - 1) ** 2)
        flat = (1 - share) * self.config.scale
        return with_spectrum(matrix.total(), lambda s: strength * (share * s / s[0] + flat))


def effective_number(products: Tensor) -> float:
    """Return how many of T task vectors count, from their inner products, (T, T) float64: 1 if they are equal.

    It is T if they are orthogonal and have one length.
    """
    total = products.trace().square().item()
    return total / products.square().sum().item() if total > 0 else 1.0
