"""Iso-C (Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
ICML 2025, arXiv:2502.04959): for each linear layer, the sum of the task vectors with a flat spectrum.

All other parameters get the mean of the task vectors, as in the authors' code. The spectrum is flattened within the
numerical rank of the sum only; see `spectrum.with_spectrum`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from neuromerge_hf.config import MergeConfig, check_number
from neuromerge_hf.engine.method import Method, Recorder, add_change
from neuromerge_hf.methods.average import average
from neuromerge_hf.options import option

if TYPE_CHECKING:
    from torch import Tensor

    from neuromerge_hf.engine.matrices import Matrix
    from neuromerge_hf.sources.unit import Unit
    from neuromerge_hf.spectrum import Factors
    from neuromerge_hf.storage.layout import Block


CITATION = """\
@inproceedings{marczak2025notaskleftbehind,
  title = {No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces},
  author = {Daniel Marczak and Simone Magistri and Sebastian Cygert and Bart{\\l}omiej Twardowski and
    Andrew D. Bagdanov and Joost van de Weijer},
  booktitle = {International Conference on Machine Learning},
  year = {2025},
  url = {https://arxiv.org/abs/2502.04959}
}"""


@dataclass(frozen=True)
class IsoCConfig(MergeConfig):
    """The hyper-parameters of Iso-C (Marczak et al., arXiv:2502.04959).

    Args:
        scale: the paper's alpha, the weight of the merged task vector.
        exclude: names of parameters to copy from the base, as shell patterns.

    Examples:
        >>> merge(["math", "code-lora"], "merged", base_model="base", config=IsoCConfig(scale=1.3)).method
        'iso_c'
    """

    method = "iso_c"
    title = "Iso-C"
    paper = "https://arxiv.org/abs/2502.04959"
    summary = """\
Iso-C (Marczak et al., ICML 2025) adds up what the fine-tunes changed in each linear layer, and makes all singular
values of the sum equal, so that no direction outweighs the others."""
    citation = CITATION
    by_matrix = True

    scale: float = option(1.0, "the weight of the merged task vector")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("scale", self.scale)


class IsoC(Method[IsoCConfig], config=IsoCConfig):
    """Iso-C of the experts."""

    def find_change(self, matrix: Matrix) -> Factors:
        from neuromerge_hf.spectrum import with_spectrum

        return with_spectrum(matrix.total(), lambda s: (self.config.scale * s.mean()).expand(len(s)))

    def merge_block(self, x: Tensor, unit: Unit, block: Block, record: Recorder) -> Tensor:
        return add_change(x[0], average(x[1:], len(unit.task_vectors)).mul_(self.config.scale))
