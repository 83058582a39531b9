"""One stored tensor of the base, with the changes that the experts make to it."""

import dataclasses
from dataclasses import dataclass

import torch

from neuromerge_hf.sources.task_vector import TaskVector
from neuromerge_hf.storage.layout import Layout
from neuromerge_hf.storage.tensors import StoredTensor


@dataclass(frozen=True)
class Unit:
    """One stored tensor of the base and what happens to it.

    Attributes:
        tensor: the base's.
        parameter: its name in the model; its name in the file if the model class does not know it.
        layout: how its entries form neurons; one row if it is not neuronal, one row an entry if it is copied.
        is_neuronal: whether it has neurons (ALGORITHM.md, section 1).
        task_vectors: one for each expert, None for an expert that does not change it; empty if it is copied.
        dtype: what it is written as.
    """

    tensor: StoredTensor
    parameter: str
    layout: Layout
    is_neuronal: bool
    task_vectors: tuple[TaskVector | None, ...]
    dtype: torch.dtype

    @property
    def changing(self) -> list[int]:
        """The experts that may change it, by their number."""
        return [expert for expert, vector in enumerate(self.task_vectors) if vector]

    @property
    def entries(self) -> int:
        """How many entries the tensor has."""
        return self.layout.rows * self.layout.width

    @property
    def nbytes(self) -> int:
        """The size that is written."""
        return self.entries * self.dtype.itemsize

    @property
    def bytes_read(self) -> int:
        """How much one pass over the base and the experts reads."""
        return self.entries * self.tensor.dtype.itemsize + sum(
            vector.bytes_read for vector in self.task_vectors if vector
        )

    def opened(self) -> "Unit":
        """The same unit for one pass over its blocks, with what they share (the factors of adapters) in memory."""
        vectors = tuple(vector.opened() if vector else None for vector in self.task_vectors)
        return dataclasses.replace(self, task_vectors=vectors)
