"""Merging every unit of a plan, block by block, into the writer."""

from collections.abc import Callable
from typing import Any

import torch

from neuromerge_hf.engine.block_merger import BlockMerger, Item
from neuromerge_hf.engine.interference import Sums
from neuromerge_hf.engine.method import Method
from neuromerge_hf.engine.passes import map_in_order
from neuromerge_hf.engine.writer import CheckpointWriter
from neuromerge_hf.planning.plan import MergePlan, Unit
from neuromerge_hf.storage.layout import Block
from neuromerge_hf.storage.tensors import read_rows


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
    merger = BlockMerger(plan, method, device)

    def process(item: Item) -> tuple[Unit, Block, list[Sums]]:
        unit, block, _ = item
        sums: list[Sums] = []
        merged = merger.merge(item, sums.append) if unit.task_vectors else read_rows(unit.tensor, unit.layout, block)
        writer.write(unit, block, merged)
        return unit, block, sums

    for unit, block, found in map_in_order(process, merger.items(plan.units), threads):
        for sums in found:
            record(unit, sums)
        advance(unit.bytes_read * len(block) // unit.layout.rows)
