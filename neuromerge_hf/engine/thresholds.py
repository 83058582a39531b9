"""Exact trim thresholds over the whole model, found by streaming, so that memory does not grow with the model.

The threshold of an expert is the j-th smallest magnitude of its whole task vector. Read as integers, the bits of
non-negative float32 numbers have the order of the numbers, so a histogram of the integers finds the threshold. A small
sample predicts a range so narrow that each float32 in it has its own bin, and one pass over the inputs then finds the
exact value. If the prediction misses, that pass narrows the range, and another pass follows.

`find_ranked` ranks other values than magnitudes as well: any non-negative function of a block.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from neuromerge_hf.engine.blocks import load_block
from neuromerge_hf.engine.histogram import BINS, Histogram, Values
from neuromerge_hf.engine.passes import Passes
from neuromerge_hf.engine.sample import SAMPLE_ENTRIES, predict_ranges
from neuromerge_hf.engine.trimming import Rank, Trimming, trim_rank
from neuromerge_hf.sources.task_vector import Difference
from neuromerge_hf.sources.unit import Unit, Work
from neuromerge_hf.storage.layout import Block


def magnitudes(x: Tensor, unit: Unit, block: Block) -> None:
    """Replace a block's task vectors with their magnitudes, which trimming ranks; see `Values`."""
    x[1:].abs_()


def find_trimmings(
    passes: Passes,
    density: float,
    values: Values = magnitudes,
    *,
    bins: int = BINS,
    sample_entries: int = SAMPLE_ENTRIES,
) -> list[Trimming]:
    """Find the exact threshold and sigma of every expert.

    Args:
        passes: how the inputs are read.
        density: the fraction of each task vector's entries that is kept.
        values: replaces the task vectors with the magnitudes to trim, for methods that change them before trimming.
        bins, sample_entries: as in `find_ranked`.

    Raises:
        MergeError: if a weight is NaN or infinite.
    """
    ranks = [Rank(expert, trim_rank(count, density)) for expert, count in enumerate(passes.work.entries)]
    return find_ranked(passes, ranks, values, bins=bins, sample_entries=sample_entries)


def find_ranked(
    passes: Passes,
    ranks: Sequence[Rank],
    values: Values = magnitudes,
    *,
    bins: int = BINS,
    sample_entries: int = SAMPLE_ENTRIES,
) -> list[Trimming]:
    """Find the exact value of every rank.

    Args:
        passes: how the inputs are read.
        ranks: the ranks to find.
        values: replaces the task vectors with the values to rank; see `Values`.
        bins: the largest number of bins of a histogram. No result depends on it.
        sample_entries: the number of entries of each expert that predict the values. No result depends on it.

    Returns:
        For every rank, its value as a threshold, and as sigma the smaller values' share of the expert's sum of values.

    Raises:
        MergeError: if a weight is NaN or infinite.
    """
    if values is magnitudes:  # a neuron's entries need not be together
        passes = replace(passes, work=Work(tuple(map(_in_stored_order, passes.work.units)), passes.work.expert_names))
    entries = passes.work.entries
    settled = {i: Trimming(0.0, 0.0, entries[rank.expert]) for i, rank in enumerate(ranks) if rank.number == 0}
    histograms: dict[int, Histogram] = {}
    if len(settled) < len(ranks):
        ranges = predict_ranges(passes, ranks, values, sample_entries)
        histograms = {i: Histogram(ranks[i].expert, low, high, bins) for i, (low, high) in ranges.items()}
    while len(settled) < len(ranks):
        histograms = {i: histogram for i, histogram in histograms.items() if i not in settled}
        _count(passes, histograms, values)
        for i, histogram in histograms.items():
            trimming = histogram.settle(ranks[i].number, entries[histogram.expert])
            if trimming:
                settled[i] = trimming
            else:
                histograms[i] = histogram.narrowed(ranks[i].number)
    return [settled[i] for i in range(len(ranks))]


def _in_stored_order(unit: Unit) -> Unit:
    """The same entries in rows that lie side by side in the files, unless an expert forms rows of its own."""
    vectors = [vector for vector in unit.task_vectors if vector]
    if unit.layout.before == 1 or not all(isinstance(vector, Difference) for vector in vectors):
        return unit
    layout = unit.layout.in_stored_order()
    return replace(
        unit,
        layout=layout,
        task_vectors=tuple(
            replace(vector, layout=layout) if isinstance(vector, Difference) else None for vector in unit.task_vectors
        ),
    )


Counts = dict[int, tuple[int, Tensor, Tensor]]
"""The results of `Histogram.count` for one block, by the number of the histogram."""


def _count(passes: Passes, histograms: Mapping[int, Histogram], values: Values) -> None:
    """Fill the histograms in one pass over the inputs."""
    kernel = passes.kernel
    experts = range(len(passes.work.expert_names))
    of_expert = [[i for i, histogram in histograms.items() if histogram.expert == expert] for expert in experts]

    def start(unit: Unit) -> tuple[Iterable[Block], Callable[[Block], Counts]]:
        def count(block: Block) -> Counts:
            if kernel and values is magnitudes:
                x = kernel.load(unit, block, passes.memory)
            else:
                x = load_block(unit, block, passes.memory, passes.device)
                values(x, unit, block)
            found = {}
            for t, expert in enumerate(unit.changing, start=1):
                for i in of_expert[expert]:
                    found[i] = histograms[i].count(x, t, passes.memory, kernel)
                    if not found[i][2].isfinite().all():
                        raise FloatingPointError("a weight is NaN or infinite")
            return found

        return passes.blocks(unit), count

    units = [unit for unit in passes.work.units if any(of_expert[expert] for expert in unit.changing)]
    for unit, results in passes.run(start, units):
        norms: dict[int, list[Tensor]] = {i: [] for expert in unit.changing for i in of_expert[expert]}
        for found in results:
            for i, (below, bins, norm) in found.items():
                histograms[i].add(below, bins)
                norms[i].append(norm)
        # A neuron's norm does not depend on the blocks, so a sum over the whole unit does not depend on them either.
        for i, of_neurons in norms.items():
            norm, kept = torch.cat(of_neurons, dim=1).sum(1).tolist()
            histograms[i].norm += norm
            histograms[i].kept += kept
