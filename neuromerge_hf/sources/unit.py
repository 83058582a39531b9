"""The input of the engine: the base's stored tensors with the experts' task vectors."""

import dataclasses
from dataclasses import dataclass

import torch

from neuromerge_hf.sources.task_vector import TaskVector
from neuromerge_hf.storage.layout import Layout
from neuromerge_hf.storage.tensors import StoredTensor


@dataclass(frozen=True, eq=False)  # units are compared by identity
class Unit:
    """One stored tensor of the base, with the experts' task vectors.

    Attributes:
        tensor: the base's stored tensor.
        parameter: the parameter's name in the model; the tensor's name in the file if the model class lacks it.
        layout: how the entries form neurons. It has one row if the tensor is not neuronal, and a row for each entry if
            the tensor is copied.
        is_neuronal: whether the tensor has neurons.
        task_vectors: the task vector of each expert, None for experts that do not change the tensor; empty if it is
            copied.
        dtype: the dtype in which the result is written.
        by_matrix: whether the tensor's matrices are merged whole, each by itself.
        is_buffer: whether the model class has no parameter of this name. A buffer may hold an infinity, as masks do.
    """

    tensor: StoredTensor
    parameter: str
    layout: Layout
    is_neuronal: bool
    task_vectors: tuple[TaskVector | None, ...]
    dtype: torch.dtype
    by_matrix: bool = False
    is_buffer: bool = False

    @property
    def changing(self) -> list[int]:
        """The numbers of the experts that may change the tensor."""
        return [expert for expert, vector in enumerate(self.task_vectors) if vector]

    @property
    def entries(self) -> int:
        """The number of entries of the tensor."""
        return self.layout.rows * self.layout.width

    @property
    def nbytes(self) -> int:
        """The size of the written tensor in bytes."""
        return self.entries * self.dtype.itemsize

    @property
    def bytes_read(self) -> int:
        """The number of bytes that one pass over the base and the experts reads."""
        return self.entries * self.tensor.dtype.itemsize + sum(
            vector.bytes_read for vector in self.task_vectors if vector
        )

    def opened(self) -> "Unit":
        """The same unit with the data that all its blocks share in memory (the factors of adapters), for one pass."""
        vectors = tuple(vector.opened() if vector else None for vector in self.task_vectors)
        return dataclasses.replace(self, task_vectors=vectors)


@dataclass(frozen=True)
class Work:
    """The units of a merge and the names of its experts.

    Attributes:
        units: a unit for every tensor that is written. All sums run in this order.
        expert_names: the names of the experts, in the order of their numbers.
    """

    units: tuple[Unit, ...]
    expert_names: tuple[str, ...]

    @property
    def merged(self) -> list[Unit]:
        """The units that at least one expert may change."""
        return [unit for unit in self.units if unit.task_vectors]

    @property
    def entries(self) -> list[int]:
        """The number of entries of each expert's task vector, over the units that the expert may change."""
        experts = range(len(self.expert_names))
        return [sum(unit.entries for unit in self.units if expert in unit.changing) for expert in experts]
