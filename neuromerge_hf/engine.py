"""The second pass over the inputs: merging every unit, block by block, into the writer."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from neuromerge_hf import low_rank
from neuromerge_hf.blocks import BLOCK_ENTRIES, Memory, load_base, load_block, map_in_order, non_finite
from neuromerge_hf.interference import Sums
from neuromerge_hf.layout import Block
from neuromerge_hf.low_rank import Factors
from neuromerge_hf.methods.method import Method
from neuromerge_hf.plan import MergePlan, Unit
from neuromerge_hf.tensors import read_rows
from neuromerge_hf.writer import CheckpointWriter


def merge_weights(
    plan: MergePlan,
    method: Method[Any],
    writer: CheckpointWriter,
    device: torch.device,
    threads: int,
    advance: Callable[[int], object] = lambda _: None,
    record: Callable[[Unit, Sums], object] = lambda _, __: None,
) -> None:
    """Merge or copy every unit of a plan.

    Args:
        method: with what it needs of the whole model; see `methods.fit_method`.
        advance: called with the number of bytes that have been read.
        record: called with the sums of every block that is merged by neurons' elections, in the order of the plan.

    Raises:
        MergeError: if a weight is NaN or infinite.
    """
    memory = Memory()
    names = [expert.name for expert in plan.experts]

    def merge(unit: Unit, block: Block, factors: Factors | None, sums: list[Sums]) -> Tensor:
        if not unit.task_vectors:
            return read_rows(unit.tensor, unit.layout, block)
        try:
            if factors:
                base = load_base(unit, block, memory, device)
                return method.merge_factors(base, factors.rows(unit, block), factors, sums.append)
            return method.merge_block(load_block(unit, block, memory, device), unit, block, sums.append)
        except FloatingPointError:
            raise non_finite(unit, block, names, device) from None

    def process(item: tuple[Unit, Block, Factors | None]) -> tuple[Unit, Block, list[Sums]]:
        unit, block, factors = item
        sums: list[Sums] = []
        writer.write(unit, block, merge(unit, block, factors, sums))
        return unit, block, sums

    for unit, block, found in map_in_order(process, _items(plan, method, device), threads):
        for sums in found:
            record(unit, sums)
        advance(unit.bytes_read * len(block) // unit.layout.rows)


def _items(plan: MergePlan, method: Method[Any], device: torch.device) -> Iterator[tuple[Unit, Block, Factors | None]]:
    for unit in map(Unit.opened, plan.units):
        factors = method.find_factors(unit, device)
        for block in unit.layout.blocks(low_rank.BLOCK_ENTRIES if factors else BLOCK_ENTRIES):
            yield unit, block, factors
