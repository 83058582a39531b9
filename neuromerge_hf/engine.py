"""The second pass over the inputs: merging every unit, block by block, into the writer."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from neuromerge_hf.blocks import BLOCK_ENTRIES, Memory, load_block, map_in_order, non_finite
from neuromerge_hf.kernel import merge_elementwise, merge_neurons, trim
from neuromerge_hf.layout import Block
from neuromerge_hf.plan import MergePlan, Unit
from neuromerge_hf.tensors import read_rows
from neuromerge_hf.writer import CheckpointWriter


def merge_weights(
    plan: MergePlan,
    thresholds: Sequence[float],
    lambda_orthogonal: float,
    writer: CheckpointWriter,
    device: torch.device,
    threads: int,
    advance: Callable[[int], object] = lambda _: None,
) -> None:
    """Merge or copy every unit of a plan.

    Args:
        thresholds: each expert's trim threshold.
        lambda_orthogonal: the paper's lambda_2, resolved.
        advance: called with the number of bytes that have been read.

    Raises:
        MergeError: if a weight is NaN or infinite.
    """
    memory = Memory()
    names = [expert.name for expert in plan.experts]

    def merge(unit: Unit, block: Block) -> Tensor:
        if not unit.task_vectors:
            return read_rows(unit.tensor, unit.layout, block)
        x = load_block(unit, block, memory, device)
        for t, expert in enumerate(unit.changing, start=1):
            if thresholds[expert] > 0:
                x[t] = trim(x[t], thresholds[expert])
        try:
            if unit.is_neuronal:
                return merge_neurons(x.transpose(0, 1), plan.config.lambda_parallel, lambda_orthogonal)
            return merge_elementwise(x[0, 0], x[1:, 0], lambda_orthogonal).unsqueeze(0)
        except FloatingPointError:
            raise non_finite(unit, block, names, device) from None

    def process(item: tuple[Unit, Block]) -> int:
        unit, block = item
        writer.write(unit, block, merge(unit, block))
        return unit.bytes_read * len(block) // unit.layout.rows

    items = ((unit, block) for unit in plan.units for block in unit.layout.blocks(BLOCK_ENTRIES))
    for count in map_in_order(process, items, threads):
        advance(count)
