"""Exact, model-wide trim thresholds, found by streaming: memory does not grow with the model.

The threshold of an expert is the j-th smallest magnitude of its whole task vector (ALGORITHM.md, section 2). The bits
of a non-negative float32, read as an integer, are in the order of its value, so a histogram of the integers finds it. A
small sample predicts a range so narrow that each float32 in it has a bin of its own, and then one pass over the inputs
settles the exact value. Where the prediction misses, the pass has narrowed the range, and another follows.

What is ranked need not be the magnitudes: `find_ranked` takes any function of a block that is not negative.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from neuromerge_hf.engine.passes import BLOCK_ENTRIES, Memory, load_block, map_in_order, non_finite
from neuromerge_hf.kernel import trim
from neuromerge_hf.planning.plan import MergePlan, Unit
from neuromerge_hf.storage.layout import Block

BINS = 1 << 20
"""How many bins there are at most: each float32 has its own in a range of 12% around the predicted threshold."""

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

INFINITY = 0x7F800000
"""The bits of infinity: those of finite magnitudes are below."""


@dataclass(frozen=True)
class Trimming:
    """How one expert's task vector is trimmed.

    Attributes:
        threshold: entries with a smaller magnitude become 0.
        sigma: the share of the task vector's L1 norm that is trimmed.
        entries: how many entries the task vector has: those of the parameters that the expert may change.
        trimmed: how many of them become 0.
    """

    threshold: float
    sigma: float
    entries: int
    trimmed: int = 0


def trim_rank(entries: int, density: float) -> int:
    """j = floor((1 - density) * entries), exact for the decimal number that the user wrote."""
    return math.floor((1 - Fraction(repr(density))) * entries)


@dataclass(frozen=True)
class Rank:
    """A value that is looked for: the `number`-th smallest of one expert's, counted from 1; 0 asks for 0.0."""

    expert: int
    number: int


Values = Callable[[Tensor, Unit, Block], None]
"""Puts what is ranked in the place of the task vectors x[1:] of a loaded block; values >= 0, in the same order as the
experts that change the unit. It must give an entry the same bits in every block."""


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
    counters: dict[int, _Counter] = {}
    if len(settled) < len(ranks):
        counters = _predict(plan, ranks, entries, device, threads, values)
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


class _Counter:
    """Counts an expert's magnitudes whose bits are in [low, high), in at most BINS bins, and those below.

    Attributes:
        below: how many magnitudes are below the range.
        counts: how many are in each bin.
        norm: the L1 norm of all entries.
        kept: the L1 norm of the entries that are not below the range.
    """

    def __init__(self, expert: int, low: int, high: int):
        self.expert = expert
        self.low = low
        self.shift = max(0, (high - low - 1).bit_length() - (BINS - 1).bit_length())
        self.bins = (high - low - 1 >> self.shift) + 1
        self.below = 0
        self.counts = torch.zeros(self.bins, dtype=torch.int64)
        self.norm = 0.0
        self.kept = 0.0

    def look(self, magnitudes: Tensor, memory: Memory) -> tuple[int, Tensor, Tensor]:
        """What to add for some neurons' magnitudes, (neurons, width) contiguous float32.

        Args:
            memory: reused, because a process that allocates megabytes for each block on each thread grows.

        Returns:
            How many are below the range, the bins of those in it, and the norms (2, neurons) of all and of the kept.
        """
        low, high = _magnitude(self.low), _magnitude(min(self.low + (self.bins << self.shift), INFINITY))
        kept, below, inside = (
            memory.take(name, magnitudes.numel(), dtype, magnitudes.device).view(magnitudes.shape)
            for name, dtype in (("kept", torch.float32), ("below", torch.bool), ("inside", torch.bool))
        )
        norms = torch.stack([magnitudes.sum(1), trim(magnitudes, low, out=kept).sum(1)]).cpu().double()
        if magnitudes.is_cpu:  # numpy's comparisons and selections are several times as fast as torch's
            array = magnitudes.numpy()
            count = int(np.count_nonzero(np.less(array, low, out=below.numpy())))
            np.less(array, high, out=inside.numpy())
            np.logical_xor(inside.numpy(), below.numpy(), out=inside.numpy())
            found = torch.from_numpy(array.ravel().compress(inside.numpy().ravel()))
        else:
            count = int(torch.lt(magnitudes, low, out=below).sum())
            found = magnitudes[torch.lt(magnitudes, high, out=inside).logical_xor_(below)].cpu()
        return count, found.view(torch.int32) - self.low >> self.shift, norms

    def add(self, below: int, bins: Tensor) -> None:
        """Add what `look` found, but for the norms."""
        self.below += below
        np.add.at(self.counts.numpy(), bins.numpy(), 1)

    def settle(self, rank: int, entries: int) -> Trimming | None:
        """The exact trimming, if the rank-th smallest magnitude is in a bin of one value."""
        found = self._find(rank)
        if self.shift or not 0 <= found < self.bins:
            return None
        values = torch.arange(self.low, self.low + found, dtype=torch.int32).view(torch.float32).double()
        kept = self.kept - (self.counts[:found].double() @ values).item()
        sigma = 1 - kept / self.norm if self.norm > 0 else 0.0
        trimmed = self.below + int(self.counts[:found].sum())
        return Trimming(_magnitude(self.low + found), sigma, entries, trimmed)

    def narrowed(self, rank: int) -> "_Counter":
        """The counter for the next pass, around the rank-th smallest magnitude."""
        found = self._find(rank)
        if found < 0:
            return _Counter(self.expert, 0, self.low)
        if found == self.bins:
            return _Counter(self.expert, self.low + (self.bins << self.shift), INFINITY)
        first = self.low + (found << self.shift)
        return _Counter(self.expert, first, first + (1 << self.shift))

    def _find(self, rank: int) -> int:
        """The bin of the rank-th smallest magnitude: -1 below the range, `bins` above."""
        if rank <= self.below:
            return -1
        return int(torch.searchsorted(self.counts.cumsum(0), rank - self.below))


def _magnitude(bits: int) -> float:
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()


def _predict(
    plan: MergePlan, ranks: Sequence[Rank], entries: list[int], device: torch.device, threads: int, values: Values
) -> dict[int, _Counter]:
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
        i: _Counter(rank.expert, *_range_around(rank.number, entries[rank.expert], samples[rank.expert]))
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


def _count(
    plan: MergePlan,
    counters: dict[int, _Counter],
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
