"""The merging pass: every block is merged by a method, or copied, and written."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from neuromerge_hf.engine.block_statistics import BlockStatistics, inner_products, sum_neurons, sum_untrimmed
from neuromerge_hf.engine.blocks import load_base, load_block
from neuromerge_hf.engine.cpu_kernel import Combination
from neuromerge_hf.engine.low_rank import find_factors
from neuromerge_hf.engine.matrices import Matrix
from neuromerge_hf.engine.measured import measured_blocks, measured_share, rows_of
from neuromerge_hf.engine.method import Method, is_elected, thresholds_of
from neuromerge_hf.engine.passes import BLOCK_ENTRIES, Passes
from neuromerge_hf.engine.rounding import is_rounded, measure
from neuromerge_hf.engine.writer import CheckpointWriter
from neuromerge_hf.errors import MergeError
from neuromerge_hf.kernel import hold_election
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.spectrum import Factors
from neuromerge_hf.storage.finite import dtype_that_holds, is_finite, largest_finite, name_of
from neuromerge_hf.storage.layout import Block
from neuromerge_hf.storage.tensors import read_rows


class UnitMerger:
    """Merges or copies one opened unit, block by block or matrix by matrix, on any number of threads.

    Attributes:
        factors: the factors of the unit's LoRA adapters if its blocks are merged from them, else None.
    """

    def __init__(self, passes: Passes, method: Method[Any], unit: Unit):
        untrimmed = [0.0] * len(unit.task_vectors)
        self.factors = (
            find_factors(unit, untrimmed, passes.device) if unit.by_matrix else method.find_factors(unit, passes.device)
        )
        self._passes = passes
        self._method = method
        self._unit = unit

    def blocks(self) -> Iterator[Block]:
        """Return the blocks in which the unit is merged: whole matrices if the method merges them."""
        if self._unit.by_matrix:
            return self._unit.layout.matrices()
        if self.factors:  # The last bits of low-rank products depend on the number of rows, so the size is fixed.
            return self._unit.layout.blocks(BLOCK_ENTRIES)
        return self._passes.blocks(self._unit)

    def merge(
        self,
        block: Block,
        record: Callable[[BlockStatistics], object],
        observe: Callable[[Tensor], object] | None = None,
    ) -> Tensor | Combination:
        """Merge or copy a block.

        Args:
            block: a block of `blocks`.
            record: called with statistics of the block: those of `Method.merge_block` if the method elects, or else of
                the untrimmed task vectors.
            observe: called with the base and the untrimmed task vectors, (1 + T, neurons, width), if they are formed.

        Returns:
            (neurons, width): the merged rows in float32, or how the compiled kernel forms them. If no expert changes
            the unit, the base's rows in their own dtype.

        Raises:
            FloatingPointError: if a weight is NaN or infinite.
        """
        unit, memory, device = self._unit, self._passes.memory, self._passes.device
        if not unit.task_vectors:
            return read_rows(unit.tensor, unit.layout, block)
        if unit.by_matrix:
            return self._merge_matrix(Matrix(unit, block, self._passes, self.factors), record)
        if self.factors:
            base = load_base(unit, block, memory, device)
            return self._method.merge_factors(base, self.factors.rows(unit, block), self.factors, record)
        kernel = self._passes.kernel
        if kernel and self._method.by_gram and unit.is_neuronal and not observe:
            x, thresholds = kernel.load(unit, block, memory), thresholds_of(unit, self._method.trimmings)
            coefficients = self._method.coefficients(kernel.gram_matrix(x, thresholds), record)
            return Combination(kernel, x, thresholds, coefficients)
        x = load_block(unit, block, memory, device)
        if observe:
            observe(x)
        if is_elected(self._method.config):
            return self._method.merge_block(x, unit, block, record)
        measured = [(rows_of(part, block), x[:, rows_of(part, block)].clone()) for part in measured_blocks(unit, block)]
        merged = self._method.merge_block(x, unit, block, lambda _: None)
        for rows, before in measured:
            change = merged[rows] - before[0]
            sums = sum_untrimmed(before, unit).with_change(change, inner_products(before[1:], change))
            record(sums.times(1 / measured_share(unit)))
        return merged

    def _merge_matrix(self, matrix: Matrix, record: Callable[[BlockStatistics], object]) -> Tensor:
        change = self._method.find_change(matrix)
        merged = torch.empty(len(matrix.block), matrix.unit.layout.width, device=self._passes.device)
        for (rows, part), (_, left) in zip(matrix.parts(merged), matrix.parts(change.left), strict=True):
            neurons, added = matrix.neurons(rows), left @ change.right
            kept = neurons.inner_products(Factors(left, change.right), added)
            record(sum_neurons(hold_election(neurons.gram, 0.0, 0.0)).with_change(added, kept))
            part.copy_(self._method.add_rows(neurons.base, added))
        return merged


Processed = tuple[list[BlockStatistics], Tensor | None]
"""The statistics of a block, and the products of its rounding."""


def merge_weights(
    passes: Passes,
    method: Method[Any],
    writer: CheckpointWriter,
    record: Callable[[Unit, BlockStatistics], object] = lambda _, __: None,
    record_rounding: Callable[[Unit, Tensor], object] | None = None,
) -> None:
    """Merge or copy every unit.

    Args:
        method: the fitted method; see `fit_method`.
        writer: writes the merged and copied blocks. The caller closes it.
        record: called with the statistics of every merged block, in the order of the units.
        record_rounding: called with the products of every rounded block (see `rounding.measure`), in the same order.

    Raises:
        MergeError: if a weight is NaN or infinite, or too large for the dtype in which it is written.
    """

    def start(unit: Unit) -> tuple[Iterable[Block], Callable[[Block], Processed]]:
        merger = UnitMerger(passes, method, unit)

        is_measured = record_rounding is not None and is_rounded(unit)

        def process(block: Block) -> Processed:
            found: list[BlockStatistics] = []
            merged = merger.merge(block, found.append)
            written = merged.to(unit.dtype)
            if not is_finite(written):
                _check_values(unit, merged[:], written)
            writer.write(unit, block, written)
            return found, measure(unit, block, merged, written, passes.memory) if is_measured else None

        return merger.blocks(), process

    for unit, results in passes.run(start):
        for found, products in results:
            for sums in found:
                record(unit, sums)
            if record_rounding and products is not None:
                record_rounding(unit, products)
        writer.finish(unit)


def _check_values(unit: Unit, merged: Tensor, written: Tensor) -> None:
    """Check the values of a block that is not finite. An infinity in a buffer of the base may stay.

    Args:
        unit: the unit that the block belongs to.
        merged: the merged or copied rows.
        written: the same rows in the dtype of the output.

    Raises:
        FloatingPointError: if a merged or copied value is NaN or infinite.
        MergeError: if a value is too large for the dtype of the output.
    """
    if not is_finite(merged):
        is_mask = unit.is_buffer and not unit.task_vectors and not merged.isnan().any()
        if not is_mask:
            raise FloatingPointError("a weight is NaN or infinite")
        if torch.equal(merged.isinf(), written.isinf()):
            return
    largest, dtype = largest_finite(merged), name_of(unit.dtype)
    raise MergeError(
        f"{unit.parameter} cannot be written in {dtype}: the merged model has {largest:.6g} in it, and {dtype} ends "
        f'at {torch.finfo(unit.dtype).max:.6g}. Pass dtype="{dtype_that_holds(largest)}" (--dtype), which holds it.'
    )
