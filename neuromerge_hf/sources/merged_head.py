"""The mean of several experts' heads. Heads have no base, so they have no task vectors that could be merged."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuromerge_hf.errors import MergeError
from neuromerge_hf.sources.checks import is_mergeable
from neuromerge_hf.sources.expert import Expert
from neuromerge_hf.sources.heads import Head
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.finite import is_finite
from neuromerge_hf.storage.layout import Layout
from neuromerge_hf.storage.tensors import StoredTensor


@dataclass(frozen=True)
class MeanTensor:
    """The weighted mean of tensors of one shape, in the dtype that their dtypes promote to."""

    name: str
    tensors: tuple[StoredTensor, ...]
    weights: tuple[float, ...]

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.tensors[0].dtype
        for tensor in self.tensors:
            dtype = torch.promote_types(dtype, tensor.dtype)
        return dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensors[0].shape

    @property
    def path(self) -> Path:
        return self.tensors[0].path

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """See `StoredTensor.read`. The mean is computed in float64.

        Raises:
            MergeError: if a weight is NaN or infinite.
        """
        total = torch.zeros(stop - start, dtype=torch.float64)
        for tensor, weight in zip(self.tensors, self.weights, strict=True):
            own = torch.empty(stop - start, dtype=tensor.dtype)
            tensor.read(start, stop, own)
            if not is_finite(own):
                raise MergeError(
                    f"{tensor.name} holds a NaN or an infinity ({tensor.path}). A damaged model cannot be merged: "
                    "train or download it again, or leave it out."
                )
            total.add_(own, alpha=weight)
        out.copy_(total / sum(self.weights))


@dataclass(frozen=True)
class MergedHead:
    """The mean of the experts' heads.

    Attributes:
        model_class_name: the name of the task model's class.
        tensors: the mean tensors by their names in the task model.
        labels: the entries id2label and label2id of the experts' configurations.
    """

    model_class_name: str
    tensors: dict[str, MeanTensor]
    labels: dict[str, Any]

    def units(self, dtype: torch.dtype | None) -> tuple[Unit, ...]:
        """The units that write the head in `dtype`, or in the dtypes of the tensors if it is None."""
        return tuple(
            Unit(tensor, name, Layout(1, 1, prod(tensor.shape), 1), False, (), dtype or tensor.dtype)
            for name, tensor in sorted(self.tensors.items())
        )


def merge_heads(experts: Sequence[Expert], weights: Sequence[float]) -> tuple[list[Expert], MergedHead | None]:
    """Merge the experts' heads by their mean.

    Args:
        experts: the experts, with or without heads.
        weights: the weight of each expert's head in the mean.

    Returns:
        The experts without their heads, and the merged head; None if no expert has a head.

    Raises:
        MergeError: if the heads differ in class, shapes or labels, or are not floating-point.
    """
    owners = [(expert, expert.head) for expert in experts if expert.head]
    shares = tuple(weight for expert, weight in zip(experts, weights, strict=True) if expert.head)
    if not owners:
        return list(experts), None
    (first, head), *others = owners
    problems = [problem for other, theirs in others if (problem := _difference(first, head, other, theirs))]
    integers = [name for name, tensor in head.tensors.items() if not is_mergeable(tensor)]
    if integers:
        problems.append(f"{first.location}: {integers[0]} of its head is {head.tensors[integers[0]].dtype}.")
    architectures = head.config.architectures or []
    if not architectures:
        problems.append(
            f"{first.location} does not say the class of its task model. Put a config.json with architectures there."
        )
    if problems:
        raise MergeError([f"The heads cannot be merged: {problem} Leave merge_heads out." for problem in problems])
    tensors = {
        name: MeanTensor(name, tuple(theirs.tensors[name] for _, theirs in owners), shares) for name in head.tensors
    }
    labels = {"id2label": head.config.id2label, "label2id": head.config.label2id}
    return [dataclasses.replace(expert, head=None) for expert in experts], MergedHead(architectures[0], tensors, labels)


def _difference(first: Expert, head: Head, other: Expert, theirs: Head) -> str | None:
    """The reason why two experts' heads have no mean; None if they have one."""
    if head.config.architectures != theirs.config.architectures:
        return (
            f"{first.location} is a {head.config.architectures}, but {other.location} is a "
            f"{theirs.config.architectures}."
        )
    for name in sorted(head.tensors.keys() | theirs.tensors.keys()):
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (head.tensors, theirs.tensors)]
        if shapes[0] != shapes[1]:
            return f"{name} is {shapes[0]} in {first.location}, but {shapes[1]} in {other.location}."
    if head.config.id2label != theirs.config.id2label:
        return (
            f"the labels of {first.location} are {head.config.id2label}, but those of {other.location} are "
            f"{theirs.config.id2label}, so that the same output means something else."
        )
    return None
