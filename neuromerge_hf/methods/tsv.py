"""TSV-M (Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging", CVPR 2025,
arXiv:2412.00081): for each linear layer, the largest singular triples of each task, decorrelated and added up.

All other parameters get the mean of the task vectors, as in the authors' code.
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
@inproceedings{gargiulo2025task,
  title = {Task Singular Vectors: Reducing Task Interference in Model Merging},
  author = {Antonio Andrea Gargiulo and Donato Crisostomi and Maria Sofia Bucarelli and Simone Scardapane and
    Fabrizio Silvestri and Emanuele Rodol{\\`a}},
  booktitle = {Conference on Computer Vision and Pattern Recognition},
  year = {2025},
  url = {https://arxiv.org/abs/2412.00081}
}"""


@dataclass(frozen=True)
class TSVConfig(MergeConfig):
    """The hyper-parameters of TSV-M (Gargiulo et al., arXiv:2412.00081).

    Args:
        scale: the paper's alpha, the weight of the merged task vector. The paper's 1 suits full fine-tunes. For LoRA
            adapters, choose it on validation data.
        exclude: names of parameters to copy from the base, as shell patterns.

    Examples:
        >>> merge(["math", "code-lora"], "merged", base_model="base", config=TSVConfig(scale=0.8)).method
        'tsv'
    """

    method = "tsv"
    title = "TSV-M"
    paper = "https://arxiv.org/abs/2412.00081"
    summary = """\
TSV-M (Gargiulo et al., CVPR 2025) takes what each fine-tune changed in each linear layer, and keeps the largest
singular triples of it. The singular vectors of all fine-tunes are made orthogonal to each other, and the triples added
up."""
    citation = CITATION
    by_matrix = True

    scale: float = option(1.0, "the weight of the merged task vector")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("scale", self.scale)

    def spectra(self, experts: int) -> int:
        return experts + 2  # of the task vectors, and of both sides' singular vectors


class TSV(Method[TSVConfig], config=TSVConfig):
    """TSV-M of the experts."""

    def find_change(self, matrix: Matrix) -> Factors:
        from neuromerge_hf.spectrum import decorrelated

        return decorrelated(matrix.task_vectors(), len(matrix.unit.task_vectors)).times(self.config.scale)

    def merge_block(self, x: Tensor, unit: Unit, block: Block, record: Recorder) -> Tensor:
        return add_change(x[0], average(x[1:], len(unit.task_vectors)).mul_(self.config.scale))
