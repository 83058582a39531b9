"""The factors of units that only LoRA adapters change. At density 1 they are merged without forming a task vector."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.layout import Block


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
        """Return the left factors of a block: (neurons, T, r) float32."""
        first = block.batch * unit.layout.neurons + block.start
        return self.left[first : first + len(block)]


def find_factors(unit: Unit, thresholds: Sequence[float], device: torch.device) -> StackedFactors | None:
    """Return the factors of a unit, or None if anything but untrimmed LoRA adapters changes it.

    Args:
        unit: an opened unit, which holds its factors in memory.
        thresholds: the trim threshold of each expert.
        device: the device of the result.
    """
    if not unit.changing or any(thresholds[expert] > 0 for expert in unit.changing):
        return None
    found = [vector.low_rank() for vector in unit.task_vectors if vector]
    vectors = [vector for vector in found if vector]
    if len(vectors) < len(found):
        return None
    rank = max(vector.rank for vector in vectors)
    left = torch.zeros(unit.layout.rows, len(vectors), rank, device=device)
    right = torch.zeros(len(vectors), rank, unit.layout.width, device=device)
    for task, vector in enumerate(vectors):
        left[:, task, : vector.rank] = vector.left
        right[task, : vector.rank] = vector.right[:, : unit.layout.width]
    rows = right.double().flatten(0, 1)
    return StackedFactors(left, right, (rows @ rows.T).view(len(vectors), rank, len(vectors), rank))
