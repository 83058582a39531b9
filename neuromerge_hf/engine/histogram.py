"""Counting values around a quantile, in bins so narrow that each float32 has its own."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neuromerge_hf.engine.passes import Memory
from neuromerge_hf.kernel import trim
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.layout import Block

BINS = 1 << 20
"""How many bins there are at most: each float32 has its own in a range of 12% around the predicted threshold."""


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


class Histogram:
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
        low, high = magnitude_of(self.low), magnitude_of(min(self.low + (self.bins << self.shift), INFINITY))
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
        return Trimming(magnitude_of(self.low + found), sigma, entries, trimmed)

    def narrowed(self, rank: int) -> "Histogram":
        """The counter for the next pass, around the rank-th smallest magnitude."""
        found = self._find(rank)
        if found < 0:
            return Histogram(self.expert, 0, self.low)
        if found == self.bins:
            return Histogram(self.expert, self.low + (self.bins << self.shift), INFINITY)
        first = self.low + (found << self.shift)
        return Histogram(self.expert, first, first + (1 << self.shift))

    def _find(self, rank: int) -> int:
        """The bin of the rank-th smallest magnitude: -1 below the range, `bins` above."""
        if rank <= self.below:
            return -1
        return int(torch.searchsorted(self.counts.cumsum(0), rank - self.below))


def magnitude_of(bits: int) -> float:
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()


@dataclass(frozen=True)
class Rank:
    """A value that is looked for: the `number`-th smallest of one expert's, counted from 1; 0 asks for 0.0."""

    expert: int
    number: int


Values = Callable[[Tensor, Unit, Block], None]
"""Puts what is ranked in the place of the task vectors x[1:] of a loaded block; values >= 0, in the same order as the
experts that change the unit. It must give an entry the same bits in every block."""
