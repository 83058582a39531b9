"""The second pass over the inputs: merging every unit, block by block, into the writer."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from neuromerge_hf import low_rank
from neuromerge_hf.blocks import BLOCK_ENTRIES, Memory, load_base, load_block, map_in_order, non_finite
from neuromerge_hf.interference import Sums, sum_entries, sum_neurons
from neuromerge_hf.kernel import Election, merge_elementwise, merge_low_rank, merge_neurons, trim
from neuromerge_hf.layout import Block
from neuromerge_hf.low_rank import Factors, find_factors
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
    record: Callable[[Unit, Sums], object] = lambda _, __: None,
) -> None:
    """Merge or copy every unit of a plan.

    Args:
        thresholds: each expert's trim threshold.
        lambda_orthogonal: the paper's lambda_2, resolved.
        advance: called with the number of bytes that have been read.
        record: called with the sums of every block that is merged, in the order of the plan.

    Raises:
        MergeError: if a weight is NaN or infinite.
    """
    memory = Memory()
    names = [expert.name for expert in plan.experts]
    lambdas = plan.config.lambda_parallel, lambda_orthogonal

    def merge(unit: Unit, block: Block, factors: Factors | None, sums: list[Sums]) -> Tensor:
        if not unit.task_vectors:
            return read_rows(unit.tensor, unit.layout, block)

        def observe(election: Election) -> None:
            sums.append(sum_neurons(election))

        try:
            if factors:
                base = load_base(unit, block, memory, device)
                left = factors.rows(unit, block)
                return merge_low_rank(base, left, factors.right, factors.overlap, *lambdas, observe)
            x = load_block(unit, block, memory, device)
            for t, expert in enumerate(unit.changing, start=1):
                if thresholds[expert] > 0:
                    trim(x[t], thresholds[expert], out=x[t])
            if unit.is_neuronal:
                return merge_neurons(x.transpose(0, 1), *lambdas, observe)
            merged = merge_elementwise(x[0, 0], x[1:, 0], lambda_orthogonal)
            sums.append(sum_entries(x[:, 0], merged))
            return merged.unsqueeze(0)
        except FloatingPointError:
            raise non_finite(unit, block, names, device) from None

    def process(item: tuple[Unit, Block, Factors | None]) -> tuple[Unit, Block, list[Sums]]:
        unit, block, factors = item
        sums: list[Sums] = []
        writer.write(unit, block, merge(unit, block, factors, sums))
        return unit, block, sums

    for unit, block, found in map_in_order(process, _items(plan, thresholds, device), threads):
        for sums in found:
            record(unit, sums)
        advance(unit.bytes_read * len(block) // unit.layout.rows)


def _items(
    plan: MergePlan, thresholds: Sequence[float], device: torch.device
) -> Iterator[tuple[Unit, Block, Factors | None]]:
    for unit in map(Unit.opened, plan.units):
        factors = find_factors(unit, thresholds, device)
        for block in unit.layout.blocks(low_rank.BLOCK_ENTRIES if factors else BLOCK_ENTRIES):
            yield unit, block, factors
