"""Merging the blocks of a plan with a method."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from neuromerge_hf.engine import low_rank
from neuromerge_hf.engine.low_rank import StackedFactors
from neuromerge_hf.engine.method import Method, Recorder
from neuromerge_hf.engine.passes import BLOCK_ENTRIES, Memory, load_base, load_block, map_in_order, non_finite
from neuromerge_hf.engine.statistics import BlockStatistics
from neuromerge_hf.engine.writer import CheckpointWriter
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.layout import Block
from neuromerge_hf.storage.tensors import read_rows

Item = tuple[Unit, Block, StackedFactors | None]


class BlockMerger:
    """Merges the blocks of a plan's units, on any number of threads."""

    def __init__(self, plan: MergePlan, method: Method[Any], device: torch.device):
        self._names = [expert.name for expert in plan.experts]
        self._method = method
        self._device = device
        self._memory = Memory()

    def items(self, units: Iterable[Unit]) -> Iterator[Item]:
        """The blocks of some units, with the factors of those that are merged from them."""
        for unit in map(Unit.opened, units):
            factors = self._method.find_factors(unit, self._device)
            for block in unit.layout.blocks(low_rank.BLOCK_ENTRIES if factors else BLOCK_ENTRIES):
                yield unit, block, factors

    def merge(self, item: Item, record: Recorder, look: Callable[[Tensor], object] = lambda _: None) -> Tensor:
        """Merge a block that some expert may change.

        Args:
            record: called with what the elections tell.
            look: is shown base and task vectors, (1 + T, neurons, width), untrimmed, where they are formed.

        Raises:
            MergeError: if a weight is NaN or infinite.
        """
        unit, block, factors = item
        try:
            if factors:
                base = load_base(unit, block, self._memory, self._device)
                return self._method.merge_factors(base, factors.rows(unit, block), factors, record)
            x = load_block(unit, block, self._memory, self._device)
            look(x)
            return self._method.merge_block(x, unit, block, record)
        except FloatingPointError:
            raise non_finite(unit, block, self._names, self._device) from None


def merge_weights(
    plan: MergePlan,
    method: Method[Any],
    writer: CheckpointWriter,
    device: torch.device,
    threads: int,
    advance: Callable[[int], object] = lambda _: None,
    record: Callable[[Unit, BlockStatistics], object] = lambda _, __: None,
) -> None:
    """Merge or copy every unit of a plan.

    Args:
        method: with what it needs of the whole model; see `methods.fit_method`.
        advance: called with the number of bytes that have been read.
        record: called with the sums of every block that is merged by neurons' elections, in the order of the plan.

    Raises:
        MergeError: if a weight is NaN or infinite.
    """
    merger = BlockMerger(plan, method, device)

    def process(item: Item) -> tuple[Unit, Block, list[BlockStatistics]]:
        unit, block, _ = item
        sums: list[BlockStatistics] = []
        merged = merger.merge(item, sums.append) if unit.task_vectors else read_rows(unit.tensor, unit.layout, block)
        writer.write(unit, block, merged)
        return unit, block, sums

    for unit, block, found in map_in_order(process, merger.items(plan.units), threads):
        for sums in found:
            record(unit, sums)
        advance(unit.bytes_read * len(block) // unit.layout.rows)
