"""Predicts the quantiles of task vectors from a sample of their entries."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from neuromerge_hf.engine.blocks import load_block
from neuromerge_hf.engine.histogram import INFINITY, Values
from neuromerge_hf.engine.passes import Passes
from neuromerge_hf.engine.trimming import Rank
from neuromerge_hf.sources.task_vector import LowRank
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.finite import is_finite
from neuromerge_hf.storage.layout import Block

SAMPLE_ENTRIES = 1 << 20
"""How many entries of an expert predict its threshold. Of adapters, whose rows differ more, four times as many."""

SAMPLE_BLOCK = 1 << 11
"""How many entries a sampled block of neurons has."""

SAMPLE_RUN = 1 << 6
"""The least number of adjacent sampled entries in tensors that do not store a neuron's entries side by side."""

MARGIN = 0.002
"""The least distance of a predicted range's ends from the wanted quantile, as a share of all entries."""

STANDARD_ERRORS = 4
"""The distance is at least this many standard errors of the sample, which are large where neurons differ."""

Sampled = list[tuple[int, Tensor]]
"""The numbers of the experts that change a block, and the values of each in it: 1-D float32 on the CPU."""


def predict_ranges(
    passes: Passes, ranks: Sequence[Rank], values: Values, sample_entries: int = SAMPLE_ENTRIES
) -> dict[int, tuple[int, int]]:
    """Predict the range of each rank's value, from evenly spaced neurons of every unit.

    Args:
        passes: how the inputs are read.
        ranks: the ranks of the values.
        values: replaces the task vectors with the values to rank; see `Values`.
        sample_entries: the size of each expert's sample.

    Returns:
        The bits [low, high) that probably enclose the value, by the position in `ranks`, without ranks of number 0.
    """
    entries = passes.work.entries
    units = passes.work.merged
    blocks = evenly_spaced(units, max(1, max(entries) // (sample_entries * sample_factor(units))))

    def start(unit: Unit) -> tuple[Iterable[Block], Callable[[Block], Sampled]]:
        rough = _row_by_row(unit)

        def sample(block: Block) -> Sampled:
            x = load_block(rough, block, passes.memory, passes.device)
            values(x, unit, block)
            if not is_finite(x[1:]):
                raise FloatingPointError("a weight is NaN or infinite")
            return [(expert, x[t].flatten().to("cpu", copy=True)) for t, expert in enumerate(unit.changing, start=1)]

        return blocks[unit.tensor.name], sample

    # One allocation for each expert: many small lasting ones between large temporary ones fragment gigabytes of memory.
    samples: list[list[Tensor]] = []
    for expert in range(len(entries)):
        changed = [unit for unit in units if expert in unit.changing]
        sizes = [len(block) * unit.layout.width for unit in changed for block in blocks[unit.tensor.name]]
        samples.append(list(torch.empty(sum(sizes)).split(sizes)))
    targets = [iter(sample) for sample in samples]
    silent = replace(passes, advance=lambda _: None)  # progress counts only the bytes that whole passes read
    for _, results in silent.run(start, units):
        for found in results:
            for expert, sampled in found:
                next(targets[expert]).copy_(sampled)
    return {
        i: _range_around(rank.number, entries[rank.expert], samples[rank.expert])
        for i, rank in enumerate(ranks)
        if rank.number > 0
    }


def sample_factor(units: Iterable[Unit]) -> int:
    """How many times `SAMPLE_ENTRIES` are sampled."""
    return 4 if any(vector.rank for unit in units for vector in unit.task_vectors if vector) else 1


def _row_by_row(unit: Unit) -> Unit:
    """A unit whose low-rank products are computed row by row, because a sample's last bits do not matter."""
    rows = (replace(vector, tile=1) if isinstance(vector, LowRank) else vector for vector in unit.task_vectors)
    return replace(unit, task_vectors=tuple(rows))


def _range_around(rank: int, entries: int, samples: list[Tensor]) -> tuple[int, int]:
    """Return the bits between which the value of a rank is, according to the samples."""
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


def evenly_spaced(units: Sequence[Unit], step: int) -> dict[str, list[Block]]:
    """Return small blocks of each unit, by the name of its tensor. Together they hold one of every `step` entries."""
    found: dict[str, list[Block]] = {}
    due = 0
    for unit in units:
        layout = unit.layout
        blocks = found[unit.tensor.name] = []
        count = SAMPLE_BLOCK // layout.width if layout.before == 1 else SAMPLE_RUN // layout.after
        while due < unit.entries:
            batch, start = divmod(due // layout.width, layout.neurons)
            block = Block(batch, start, min(start + max(1, count), layout.neurons))
            blocks.append(block)
            due += step * len(block) * layout.width
        due -= unit.entries
    return found
