"""What a merge will do: the units that it writes, from which tensors, and what that costs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from neuromerge_hf.config import NeuroMergingConfig
from neuromerge_hf.layout import Layout
from neuromerge_hf.sources.task_vector import TaskVector
from neuromerge_hf.tensors import StoredTensor

if TYPE_CHECKING:  # they load transformers
    from neuromerge_hf.sources.expert import Base, Expert


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


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do.

    Attributes:
        config: the hyper-parameters.
        base: the base model, opened.
        experts: the experts, opened, in the user's order.
        units: every tensor that will be written, in the order of their names, which is the order of all sums.
        dtype: the name of the dtype that was asked for, or "auto" for each tensor's own.
        bytes_to_download: the size of the weight files that are not in the Hub's cache yet.
        downloaded: the models whose weights had to be downloaded to be planned, because ``.bin`` files have no header.
        threads: how many compute.
    """

    config: NeuroMergingConfig
    base: "Base"
    experts: "tuple[Expert, ...]"
    units: tuple[Unit, ...]
    dtype: str
    bytes_to_download: int = 0
    downloaded: tuple[str, ...] = ()
    threads: int = 1

    def __str__(self) -> str:
        from neuromerge_hf.summary import summary  # needs the engine's constants, and the engine needs this module

        return summary(self)

    @property
    def merged(self) -> list[str]:
        """The parameters that at least one expert may change."""
        return [unit.parameter for unit in self.units if unit.task_vectors]

    @property
    def copied(self) -> list[str]:
        """The parameters and buffers that are copied from the base."""
        return [unit.parameter for unit in self.units if not unit.task_vectors]

    @property
    def architecture(self) -> str | None:
        """The merged model's class, if not the base's: the experts', where they agree and none has its own head."""
        classes = {expert.model_class_name for expert in self.experts}
        if len(classes) == 1 and not any(expert.head for expert in self.experts):
            return classes.pop()
        return None

    @property
    def bytes_written(self) -> int:
        """The size of the merged weights, and of the heads beside them."""
        heads = sum(expert.head.nbytes for expert in self.experts if expert.head)
        return sum(unit.nbytes for unit in self.units) + heads

    @property
    def bytes_read(self) -> int:
        """How much is read in all: once for the thresholds, unless density is 1, and once for the merge.

        Not counted: the samples that predict the thresholds, and hashing local files for the recipe.
        """
        passes = 1 if self.config.density == 1 else 2
        return sum(unit.bytes_read * (passes if unit.task_vectors else 1) for unit in self.units)

    @property
    def disk_needed(self) -> int:
        """What is downloaded, written, and kept in temporary files beside the output, in bytes."""
        temporary = sum(expert.preparation.nbytes for expert in self.experts if expert.preparation)
        return self.bytes_to_download + self.bytes_written + temporary


def readable_size(count: float) -> str:
    """A number of bytes with three digits: "1.24 GB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
