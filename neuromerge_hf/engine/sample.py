"""Predicting where the quantiles of task vectors are, from a sample of their entries."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from neuromerge_hf.engine.histogram import INFINITY, Histogram, Rank, Values
from neuromerge_hf.engine.passes import Memory, load_block, map_in_order
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.layout import Block

SAMPLE_ENTRIES = 1 << 22
"""How many entries of each expert predict its threshold."""


SAMPLE_BLOCK = 1 << 11
"""How many entries of the sample are in one block of neurons."""


SAMPLE_RUN = 1 << 6
"""How many entries of the sample at least follow each other on the disk, where a neuron's own do not."""


MARGIN = 0.002
"""The first pass looks at the values between the sample's quantiles at least this far from the wanted one."""


STANDARD_ERRORS = 4
"""The margin is larger where neurons differ: this many standard errors of the sample."""


def predict_ranges(
    plan: MergePlan, ranks: Sequence[Rank], entries: list[int], device: torch.device, threads: int, values: Values
) -> dict[int, Histogram]:
    """Counters around the quantiles of a sample: some neurons of every unit, evenly spaced."""
    memory = Memory()
    units = [unit for unit in plan.units if unit.task_vectors]
    step = max(1, max(entries) // SAMPLE_ENTRIES)

    def sample(item: tuple[Unit, Block]) -> list[tuple[int, Tensor]]:
        unit, block = item
        x = load_block(unit, block, memory, device)
        values(x, unit, block)
        return [(expert, x[t].flatten().to("cpu", copy=True)) for t, expert in enumerate(unit.changing, start=1)]

    blocks = list(_evenly_spaced(units, step))
    # One allocation for each expert: many small ones that stay, among large ones that come and go, take gigabytes.
    samples: list[list[Tensor]] = []
    for expert in range(len(plan.experts)):
        sizes = [len(block) * unit.layout.width for unit, block in blocks if expert in unit.changing]
        samples.append(list(torch.empty(sum(sizes)).split(sizes)))
    places = [iter(sample) for sample in samples]
    for found in map_in_order(sample, blocks, threads):
        for expert, sampled in found:
            next(places[expert]).copy_(sampled)
    return {
        i: Histogram(rank.expert, *_range_around(rank.number, entries[rank.expert], samples[rank.expert]))
        for i, rank in enumerate(ranks)
        if rank.number > 0
    }


def _range_around(rank: int, entries: int, samples: list[Tensor]) -> tuple[int, int]:
    """The bits between which the magnitude of a rank is, as far as the samples tell."""
    if not samples:
        return 0, INFINITY
    ordered = np.sort(torch.cat(samples).numpy())
    last = len(ordered) - 1

    def value(share: float) -> np.float32:
        return ordered[min(max(0, round(share * last)), last)]

    quantile = rank / entries
    middle = value(quantile)
    shares = [np.count_nonzero(block.numpy() <= middle) / len(block) for block in samples]
    standard_error = float(np.std(shares)) * math.sqrt((1 - len(ordered) / entries) / len(shares))
    margin = max(MARGIN, STANDARD_ERRORS * standard_error)
    return int(value(quantile - margin).view(np.int32)), int(value(quantile + margin).view(np.int32)) + 1


def _evenly_spaced(units: Sequence[Unit], step: int) -> Iterator[tuple[Unit, Block]]:
    """Small blocks that hold one in `step` of all entries."""
    due = 0
    for unit in map(Unit.opened, units):
        layout = unit.layout
        count = SAMPLE_BLOCK // layout.width if layout.before == 1 else SAMPLE_RUN // layout.after
        while due < unit.entries:
            batch, start = divmod(due // layout.width, layout.neurons)
            block = Block(batch, start, min(start + max(1, count), layout.neurons))
            yield unit, block
            due += step * len(block) * layout.width
        due -= unit.entries
