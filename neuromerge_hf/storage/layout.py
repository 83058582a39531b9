"""How the entries of a stored tensor form neurons, and the blocks in which neurons are read."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Neurons [start, stop) of one batch of a tensor."""

    batch: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def split(self, neurons: int) -> "Iterator[Block]":
        """Blocks of at most so many neurons that make up this one, in order."""
        for start in range(self.start, self.stop, neurons):
            yield Block(self.batch, start, min(start + neurons, self.stop))


@dataclass(frozen=True)
class Layout:
    """A tensor seen as (batch, before, neurons, after): a neuron is the vector [batch, :, neuron, :].

    A Linear weight (out, in) is (1, 1, out, in), GPT-2's Conv1D (in, out) is (1, in, out, 1), fused experts
    (E, in, out) are (E, in, out, 1). If `before` is 1, the neurons are contiguous on the disk, and the batch is folded
    into them.

    Attributes:
        matrix: how many neurons each matrix of a linear layer has; 0 if the tensor holds none. Fused experts hold one
            matrix for each expert.
    """

    batch: int
    before: int
    neurons: int
    after: int
    matrix: int = 0

    @classmethod
    def of(cls, shape: tuple[int, ...], axis: int | None) -> "Layout":
        """The layout of a tensor whose neurons lie along `axis`; None makes the whole tensor one row."""
        if axis is None:
            return cls(1, 1, 1, math.prod(shape))
        return cls(1, math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))._folded()

    @classmethod
    def of_experts(cls, shape: tuple[int, ...], axis: int) -> "Layout":
        """The layout of fused expert weights (E, ...): neurons along `axis` (1 or 2) of each of the E experts."""
        return cls(shape[0], math.prod(shape[1:axis]), shape[axis], math.prod(shape[axis + 1 :]))._folded()

    def _folded(self) -> "Layout":
        return Layout(1, 1, self.batch * self.neurons, self.after) if self.before == 1 else self

    def in_stored_order(self) -> "Layout":
        """The layout of the same tensor whose rows lie side by side on the disk, whatever its neurons are."""
        return Layout(1, 1, self.batch * self.before, self.neurons * self.after)

    @property
    def rows(self) -> int:
        """The number of neurons over all batches."""
        return self.batch * self.neurons

    @property
    def width(self) -> int:
        """The number of incoming weights of a neuron."""
        return self.before * self.after

    def blocks(self, entries: int) -> Iterator[Block]:
        """Blocks of whole neurons with about `entries` entries each, in their order on the disk."""
        step = max(1, entries // max(1, self.width))
        for batch in range(self.batch):
            yield from Block(batch, 0, self.neurons).split(step)

    def matrices(self) -> Iterator[Block]:
        """One block for each matrix of a linear layer, in their order on the disk."""
        for batch in range(self.batch):
            yield from Block(batch, 0, self.neurons).split(self.matrix)

    def runs(self, block: Block) -> Iterator[tuple[int, int]]:
        """The ranges [start, stop) of the flat tensor that make up a block, in order."""
        for i in range(block.batch * self.before, (block.batch + 1) * self.before):
            first = i * self.neurons * self.after
            yield first + block.start * self.after, first + block.stop * self.after

    def to_rows(self, flat: Tensor, block: Block) -> Tensor:
        """Arrange a block's entries, which are in their order on the disk, as (neurons, width)."""
        if self.before == 1:
            return flat.view(len(block), self.width)
        return flat.view(self.before, len(block), self.after).transpose(0, 1).reshape(len(block), self.width)

    def from_rows(self, rows: Tensor, block: Block) -> Tensor:
        """Undo `to_rows`: return a contiguous tensor with the entries in their order on the disk."""
        if self.before == 1:
            return rows
        return rows.view(len(block), self.before, self.after).transpose(0, 1).contiguous()
