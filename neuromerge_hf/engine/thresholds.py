"""Exact, model-wide trim thresholds, found by streaming: memory does not grow with the model.

The threshold of an expert is the j-th smallest magnitude of its whole task vector (ALGORITHM.md, section 2). The bits
of a non-negative float32, read as an integer, are in the order of its value, so a histogram of the integers finds it. A
small sample predicts a range so narrow that each float32 in it has a bin of its own, and then one pass over the inputs
settles the exact value. Where the prediction misses, the pass has narrowed the range, and another follows.

What is ranked need not be the magnitudes: `find_ranked` takes any function of a block that is not negative.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from neuromerge_hf.engine.histogram import Histogram, Rank, Trimming, Values
from neuromerge_hf.engine.passes import BLOCK_ENTRIES, Memory, load_block, map_in_order, non_finite
from neuromerge_hf.engine.sample import predict_ranges
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.layout import Block


def trim_rank(entries: int, density: float) -> int:
    """j = floor((1 - density) * entries), exact for the decimal number that the user wrote."""
    return math.floor((1 - Fraction(repr(density))) * entries)


def magnitudes(x: Tensor, unit: Unit, block: Block) -> None:
    """The `Values` that trimming ranks."""
    x[1:].abs_()


def count_entries(plan: MergePlan) -> list[int]:
    """How many entries each expert's task vector has: those of the parameters that it may change."""
    experts = range(len(plan.experts))
    return [sum(unit.entries for unit in plan.units if expert in unit.changing) for expert in experts]


def find_trimmings(
    plan: MergePlan,
    density: float,
    device: torch.device,
    threads: int,
    advance: Callable[[int], object] = lambda _: None,
    values: Values = magnitudes,
) -> list[Trimming]:
    """The exact threshold and sigma of every expert.

    Args:
        density: the fraction of each task vector's entries that is kept.
        advance: called with the number of bytes that have been read.
        values: the magnitudes, where the task vectors are not trimmed as they are.

    Raises:
        MergeError: if a weight is NaN or infinite.
    """
    ranks = [Rank(expert, trim_rank(count, density)) for expert, count in enumerate(count_entries(plan))]
    return find_ranked(plan, ranks, device, threads, advance, values)


def find_ranked(
    plan: MergePlan,
    ranks: Sequence[Rank],
    device: torch.device,
    threads: int,
    advance: Callable[[int], object] = lambda _: None,
    values: Values = magnitudes,
) -> list[Trimming]:
    """The exact value of every rank, as a threshold, and the share of the expert's sum of values that is below it.

    Args:
        advance: called with the number of bytes that have been read.

    Raises:
        MergeError: if a weight is NaN or infinite.
    """
    entries = count_entries(plan)
    settled = {i: Trimming(0.0, 0.0, entries[rank.expert]) for i, rank in enumerate(ranks) if rank.number == 0}
    counters: dict[int, Histogram] = {}
    if len(settled) < len(ranks):
        counters = predict_ranges(plan, ranks, entries, device, threads, values)
    while len(settled) < len(ranks):
        counters = {i: counter for i, counter in counters.items() if i not in settled}
        _count(plan, counters, device, threads, advance, values)
        for i, counter in counters.items():
            trimming = counter.settle(ranks[i].number, entries[counter.expert])
            if trimming:
                settled[i] = trimming
            else:
                counters[i] = counter.narrowed(ranks[i].number)
    return [settled[i] for i in range(len(ranks))]


def _count(
    plan: MergePlan,
    counters: dict[int, Histogram],
    device: torch.device,
    threads: int,
    advance: Callable[[int], object],
    values: Values,
) -> None:
    """Fill the counters, in one pass over the inputs."""
    memory = Memory()
    names = [expert.name for expert in plan.experts]

    def count(item: tuple[Unit, Block]) -> dict[int, tuple[int, Tensor, Tensor]]:
        unit, block = item
        x = load_block(unit, block, memory, device)
        values(x, unit, block)
        found = {}
        for t, expert in enumerate(unit.changing, start=1):
            for i in of_expert[expert]:
                found[i] = counters[i].look(x[t], memory)
                if not found[i][2].isfinite().all():
                    raise non_finite(unit, block, names, device)
        return found

    of_expert = [[i for i, counter in counters.items() if counter.expert == expert] for expert in range(len(names))]
    units = [unit for unit in plan.units if any(of_expert[expert] for expert in unit.changing)]
    items = ((unit, block) for unit in map(Unit.opened, units) for block in unit.layout.blocks(BLOCK_ENTRIES))
    results = map_in_order(count, items, threads)
    for unit in units:
        norms: dict[int, list[Tensor]] = {i: [] for expert in unit.changing for i in of_expert[expert]}
        for block in unit.layout.blocks(BLOCK_ENTRIES):
            for i, (below, bins, norm) in next(results).items():
                counters[i].add(below, bins)
                norms[i].append(norm)
            advance(unit.bytes_read * len(block) // unit.layout.rows)
        # A neuron's norm does not depend on the blocks. Summed over whole units, neither does the total.
        for i, of_neurons in norms.items():
            norm, kept = torch.cat(of_neurons, dim=1).sum(1).tolist()
            counters[i].norm += norm
            counters[i].kept += kept
