"""Units that only LoRA adapters change: at density 1 they are merged without forming a task vector."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuromerge_hf.sources.task_vector import LowRank
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.layout import Block

BLOCK_ENTRIES = 1 << 20
"""How many entries of a tensor are worked on at a time. A constant: the last bit of a product depends on it."""


@dataclass(frozen=True)
class StackedFactors:
    """The stacked factors of a unit's task vectors, ``tau_t = left_t @ right_t``; see `kernel.merge_low_rank`.

    Attributes:
        left: (rows, T, r) float32.
        right: (T, r, width) float32.
        overlap: (T, r, T, r) float64, the inner products of the rows of `right`.
    """

    left: Tensor
    right: Tensor
    overlap: Tensor

    def rows(self, unit: Unit, block: Block) -> Tensor:
        """The left factors of a block, (neurons, T, r)."""
        first = block.batch * unit.layout.neurons + block.start
        return self.left[first : first + len(block)]


def find_factors(unit: Unit, thresholds: Sequence[float], device: torch.device) -> StackedFactors | None:
    """The factors of a unit, if all that changes it is untrimmed LoRA."""
    vectors = [vector for vector in unit.task_vectors if isinstance(vector, LowRank) and vector.stored is None]
    if not vectors or len(vectors) < len(unit.changing) or any(thresholds[expert] > 0 for expert in unit.changing):
        return None
    rank = max(vector.left.shape[1] for vector in vectors)
    left = torch.zeros(unit.layout.rows, len(vectors), rank, device=device)
    right = torch.zeros(len(vectors), rank, unit.layout.width, device=device)
    for task, vector in enumerate(vectors):
        left[:, task, : vector.left.shape[1]] = vector.left
        right[task, : vector.left.shape[1]] = vector.right[:, : unit.layout.width]
    rows = right.double().flatten(0, 1)
    return StackedFactors(left, right, (rows @ rows.T).view(len(vectors), rank, len(vectors), rank))
