"""Reads the matrices of linear layers whole, for methods that do not merge neuron by neuron."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neuromerge_hf.engine.blocks import load_base, load_block, load_task_vector
from neuromerge_hf.engine.passes import BLOCK_ENTRIES, Passes
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.spectrum import Factors
from neuromerge_hf.storage.layout import Block


@dataclass(frozen=True)
class Matrix:
    """The matrix of one linear layer, with the task vectors of the T experts that change it. They are read when asked.

    Attributes:
        unit: the opened unit that the matrix belongs to.
        block: the neurons of the unit that make up the matrix.
        passes: how the inputs are read.
    """

    unit: Unit
    block: Block
    passes: Passes

    def total(self) -> Tensor | Factors:
        """Return the sum of the task vectors: (rows, columns) float32, or in factors if all of them are.

        Raises:
            FloatingPointError: if an input holds a NaN or an infinity.
        """
        factors = self._factors()
        if factors:
            return Factors.stacked(factors)
        total = torch.empty(len(self.block), self.unit.layout.width, device=self.passes.device)
        for rows, part in self.parts(total):
            x = load_block(self.unit, rows, self.passes.memory, self.passes.device)
            part.copy_(x[1])
            for task_vector in x[2:]:  # in their order: the last bits of torch's own sums depend on the place in memory
                part += task_vector
        return _finite(total)

    def task_vectors(self) -> Iterator[Tensor | Factors]:
        """Yield the task vector of each expert: (rows, columns) float32, or in factors if all of them are.

        Raises:
            FloatingPointError: if an input holds a NaN or an infinity.
        """
        factors = self._factors()
        if factors:
            yield from factors
            return
        for expert in self.unit.changing:
            whole = torch.empty(len(self.block), self.unit.layout.width, device=self.passes.device)
            for rows, part in self.parts(whole):
                load_task_vector(self.unit, expert, rows, part, self.passes.memory)
            yield _finite(whole)

    def base(self, rows: Block) -> Tensor:
        """Return some rows of the base: (rows, columns) float32, valid until the next call on this thread."""
        return load_base(self.unit, rows, self.passes.memory, self.passes.device)

    def parts(self, whole: Tensor) -> Iterator[tuple[Block, Tensor]]:
        """Divide a tensor with the matrix' rows: yield blocks of a fixed size, each with its rows of the tensor."""
        for rows in self.block.split(max(1, BLOCK_ENTRIES // self.unit.layout.width)):
            yield rows, whole[rows.start - self.block.start : rows.stop - self.block.start]

    def _factors(self) -> list[Factors]:
        found = [vector.low_rank() for vector in self.unit.task_vectors if vector]
        first = self.block.batch * self.unit.layout.neurons + self.block.start
        rows, device = slice(first, first + len(self.block)), self.passes.device
        factors = [Factors(each.left[rows].to(device), each.right.to(device)) for each in found if each]
        return factors if len(factors) == len(found) else []


def _finite(matrix: Tensor) -> Tensor:
    if not matrix.isfinite().all():
        raise FloatingPointError("a weight is NaN or infinite")
    return matrix
