"""Reads the matrices of linear layers whole, for methods that do not merge neuron by neuron."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neuromerge_hf.engine.blocks import load_base, load_block, load_task_vector
from neuromerge_hf.engine.low_rank import StackedFactors
from neuromerge_hf.engine.passes import BLOCK_ENTRIES, Passes
from neuromerge_hf.kernel import gram_matrix, low_rank_gram
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
        factors: the factors of the unit's task vectors; None unless all of them have factors.
    """

    unit: Unit
    block: Block
    passes: Passes
    factors: StackedFactors | None

    def total(self) -> Tensor | Factors:
        """Return the sum of the task vectors: (rows, columns) float32, or in factors if all of them are.

        Raises:
            FloatingPointError: if an input holds a NaN or an infinity.
        """
        if self.factors:
            return Factors(self.factors.rows(self.unit, self.block).flatten(1), self.factors.right.flatten(0, 1))
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
        if self.factors:
            left = self.factors.rows(self.unit, self.block)
            for task in range(left.shape[1]):
                yield Factors(left[:, task], self.factors.right[task])
            return
        for expert in self.unit.changing:
            whole = torch.empty(len(self.block), self.unit.layout.width, device=self.passes.device)
            for rows, part in self.parts(whole):
                load_task_vector(self.unit, expert, rows, part, self.passes.memory)
            yield _finite(whole)

    def neurons(self, rows: Block) -> "Neurons":
        """Return some neurons. They are valid until the next call on this thread."""
        memory, device = self.passes.memory, self.passes.device
        if factors := self.factors:
            base, left = load_base(self.unit, rows, memory, device), factors.rows(self.unit, rows)
            task_vectors = [Factors(left[:, task], right) for task, right in enumerate(factors.right)]
            return Neurons(base, low_rank_gram(base, left, factors.right, factors.overlap), task_vectors)
        if kernel := self.passes.kernel:
            stored = kernel.load(self.unit, rows, memory)
            gram = kernel.gram_matrix(stored, [0.0] * (len(stored) - 1))
            base = stored[0].float()
            return Neurons(base, gram, kernel.task_vectors(stored))
        x = load_block(self.unit, rows, memory, device)
        return Neurons(x[0], gram_matrix(x.transpose(0, 1)), x[1:])

    def products(self) -> Tensor:
        """Return the inner products of the task vectors: (T, T) float64."""
        grams = (self.neurons(rows).gram for rows, _ in self.parts(torch.empty(len(self.block), 0)))
        return torch.stack([gram[:, 1:, 1:].sum(0) for gram in grams]).sum(0)

    def parts(self, whole: Tensor) -> Iterator[tuple[Block, Tensor]]:
        """Divide a tensor with the matrix' rows: yield blocks of a fixed size, each with its rows of the tensor."""
        for rows in self.block.split(max(1, BLOCK_ENTRIES // self.unit.layout.width)):
            yield rows, whole[rows.start - self.block.start : rows.stop - self.block.start]


@dataclass(frozen=True)
class Neurons:
    """Some neurons of a matrix.

    Attributes:
        base: (neurons, columns) float32, their old weights.
        gram: (neurons, 1 + T, 1 + T) float64, the inner products of their old weights and task vectors.
        task_vectors: those of the T experts, (neurons, columns) float32 or in factors. They can be read once.
    """

    base: Tensor
    gram: Tensor
    task_vectors: Iterable[Tensor | Factors]

    def inner_products(self, change: Factors, added: Tensor) -> Tensor:
        """Return the inner products of the task vectors with a merged one, which is given in factors and formed.

        Returns:
            (T,) float64.
        """
        products = []
        for found in self.task_vectors:
            if isinstance(found, Factors):
                in_factors = found.left * (change.left @ (change.right @ found.right.T))
                products.append(in_factors.sum(1).double().sum())
            else:
                products.append((found * added).sum(1).double().sum())
        return torch.stack(products)


def _finite(matrix: Tensor) -> Tensor:
    if not matrix.isfinite().all():
        raise FloatingPointError("a weight is NaN or infinite")
    return matrix
