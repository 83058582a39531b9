"""Tensors and task vectors with a row for each token, read in the row order of another vocabulary."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from neuromerge_hf.sources.task_vector import TaskVector
from neuromerge_hf.storage.layout import Block, Layout
from neuromerge_hf.storage.tensors import StoredTensor


@dataclass(frozen=True)
class AlignedVector:
    """A task vector in the row order of another vocabulary. Rows that the expert lacks are 0.

    Attributes:
        vector: the task vector in the expert's own row order. It must use the base only as the weights to subtract,
            because the base can have a token in another row than the expert.
        layout: the layout of the expert's own tensor; one row if the parameter is 1-D.
        rows: (rows,) int64, the expert's row for each row of the other vocabulary, or -1.
        weight: the weight of the expert in the mean that replaces a row which the base lacks.
    """

    vector: TaskVector
    layout: Layout
    rows: Tensor
    weight: float = 1.0

    @property
    def file(self) -> str:
        return self.vector.file

    @property
    def bytes_read(self) -> int:
        return self.vector.bytes_read

    @property
    def rank(self) -> int:
        return self.vector.rank

    def opened(self) -> "AlignedVector":
        return replace(self, vector=self.vector.opened())

    def low_rank(self) -> None:
        return None  # the factors' rows are in the expert's own order

    def write(self, out: Tensor, block: Block, base: Tensor, buffer: Tensor) -> None:
        """See `TaskVector.write`. `base` is in the row order of the other vocabulary."""
        out.zero_()
        if self.layout.rows > 1:
            for start, stop, row in runs(self.rows[block.start : block.stop]):
                found = Block(0, row, row + stop - start)
                self.vector.write(out[start:stop], found, base[start:stop], buffer)
            return
        here = (self.rows >= 0).nonzero().flatten()
        there = self.rows[here]
        own_base = base.new_zeros(1, self.layout.width)
        own_base[:, there] = base[:, here]
        own = torch.empty_like(own_base)
        self.vector.write(own, block, own_base, torch.empty(own.numel() * 8, dtype=torch.uint8))
        out[:, here] = own[:, there]

    def weights(self, start: int, stop: int) -> Tensor:
        """The expert's weights in rows [start, stop) of the other vocabulary: (stop - start, width) float32, CPU."""
        if self.layout.rows == 1:
            out = torch.empty(1, len(self.rows))
            block = Block(0, 0, 1)
        else:
            out = torch.empty(stop - start, self.layout.width)
            block = Block(0, start, stop)
        self.write(out, block, torch.zeros_like(out), torch.empty(out.numel() * 8, dtype=torch.uint8))
        return out if self.layout.rows > 1 else out.T[start:stop]


@dataclass(frozen=True)
class AlignedTensor:
    """A tensor of the base in the row order of another vocabulary.

    Attributes:
        tensor: the base's stored tensor.
        shape: the shape of the tensor with the other vocabulary's number of rows.
        rows: (rows,) int64, the base's row for each row of the other vocabulary, or -1.
        experts: the experts for the rows that the base lacks. Such a row is the mean over those that have it, else 0.
    """

    tensor: StoredTensor
    shape: tuple[int, ...]
    rows: Tensor
    experts: tuple[AlignedVector, ...] = ()

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def path(self) -> Path:
        return self.tensor.path

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """See `StoredTensor.read`."""
        width = prod(self.shape) // len(self.rows)
        first, last = start // width, -(-stop // width)
        rows = self.rows[first:last]
        for begin, end, row in runs(rows):
            here = max(start, (first + begin) * width), min(stop, (first + end) * width)
            shift = (row - first - begin) * width
            self.tensor.read(here[0] + shift, here[1] + shift, out[here[0] - start : here[1] - start])
        for begin, end, _ in runs(torch.where(rows < 0, torch.arange(len(rows)), -1)):
            here = max(start, (first + begin) * width), min(stop, (first + end) * width)
            new = self._mean(first + begin, first + end, width).flatten()
            skipped = (first + begin) * width
            out[here[0] - start : here[1] - start] = new[here[0] - skipped : here[1] - skipped]

    def _mean(self, start: int, stop: int, width: int) -> Tensor:
        total, shares = torch.zeros(stop - start, width), torch.zeros(stop - start, 1)
        for expert in self.experts:
            total.add_(expert.weights(start, stop), alpha=expert.weight)
            shares.add_((expert.rows[start:stop] >= 0).unsqueeze(1).float(), alpha=expert.weight)
        return total / shares.where(shares > 0, 1.0)


def runs(rows: Tensor) -> Iterator[tuple[int, int, int]]:
    """The longest ranges [start, stop) in which `rows` counts up by one, each with its first row. They exclude -1."""
    ends = (rows[1:] != rows[:-1] + 1) | (rows[:-1] < 0)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends.nonzero().flatten() + 1])
    stops = torch.cat([starts[1:], torch.tensor([len(rows)])])
    found = rows[starts] >= 0
    return zip(starts[found].tolist(), stops[found].tolist(), rows[starts][found].tolist(), strict=True)
