"""Histograms of the values around a quantile, in bins so narrow that each float32 has its own."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from neuromerge_hf.engine.blocks import Memory
from neuromerge_hf.engine.cpu_kernel import CPUKernel
from neuromerge_hf.engine.trimming import Trimming
from neuromerge_hf.kernel import trim
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.layout import Block

BINS = 1 << 20
"""The largest number of bins. Each float32 in a range of 12% around the predicted threshold has its own."""

INFINITY = 0x7F800000
"""The bits of infinity, an integer above the bits of all finite magnitudes."""


class Histogram:
    """Counts an expert's magnitudes with bits in [low, high), in at most `max_bins` bins, and the magnitudes below.

    Attributes:
        below: the number of magnitudes below the range.
        counts: (bins,) int64, the number of magnitudes in each bin.
        norm: the L1 norm of all entries.
        kept: the L1 norm of the entries that are not below the range.
    """

    def __init__(self, expert: int, low: int, high: int, max_bins: int = BINS):
        self.expert = expert
        self.low = low
        self.max_bins = max_bins
        self.shift = max(0, (high - low - 1).bit_length() - (max_bins - 1).bit_length())
        self.bins = (high - low - 1 >> self.shift) + 1
        self.below = 0
        self.counts = torch.zeros(self.bins, dtype=torch.int64)
        self.norm = 0.0
        self.kept = 0.0

    def count(self, x: Tensor, row: int, memory: Memory, kernel: CPUKernel | None) -> tuple[int, Tensor, Tensor]:
        """Count the magnitudes of some neurons, without changing the histogram.

        Args:
            x: (1 + T, neurons, width), contiguous: float32 magnitudes, or what the compiled kernel loads.
            row: which row of `x` to count.
            memory: buffers to reuse. A process that allocates megabytes for each block on each thread grows.
            kernel: the compiled kernel; None for torch.

        Returns:
            The number of magnitudes below the range, the bin of each magnitude in the range, and the L1 norms of all
            entries and of those not below the range: (2, neurons) float64.
        """
        low, high = magnitude_of(self.low), magnitude_of(min(self.low + (self.bins << self.shift), INFINITY))
        if kernel:
            count, bits, norms = kernel.count(x, row, low, high, memory)
            return count, bits - self.low >> self.shift, norms
        magnitudes = x[row]
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
        """Add the counts that `count` returned. The caller adds the norms."""
        self.below += below
        np.add.at(self.counts.numpy(), bins.numpy(), 1)

    def settle(self, rank: int, entries: int) -> Trimming | None:
        """Return the exact trimming, or None if the rank-th smallest magnitude is not in a bin of one value."""
        found = self._find(rank)
        if self.shift or not 0 <= found < self.bins:
            return None
        values = torch.arange(self.low, self.low + found, dtype=torch.int32).view(torch.float32).double()
        kept = self.kept - (self.counts[:found].double() @ values).item()
        sigma = 1 - kept / self.norm if self.norm > 0 else 0.0
        trimmed = self.below + int(self.counts[:found].sum())
        return Trimming(magnitude_of(self.low + found), sigma, entries, trimmed)

    def narrowed(self, rank: int) -> "Histogram":
        """Return an empty histogram for the next pass, around the rank-th smallest magnitude."""
        found = self._find(rank)
        if found < 0:
            return Histogram(self.expert, 0, self.low, self.max_bins)
        if found == self.bins:
            return Histogram(self.expert, self.low + (self.bins << self.shift), INFINITY, self.max_bins)
        first = self.low + (found << self.shift)
        return Histogram(self.expert, first, first + (1 << self.shift), self.max_bins)

    def _find(self, rank: int) -> int:
        """Return the bin of the rank-th smallest magnitude: -1 if it is below the range, `bins` if it is above."""
        if rank <= self.below:
            return -1
        return int(torch.searchsorted(self.counts.cumsum(0), rank - self.below))


def magnitude_of(bits: int) -> float:
    """Return the float32 with these bits."""
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()


Values = Callable[[Tensor, Unit, Block], None]
"""A function that replaces the task vectors x[1:] of a loaded block with the values to rank, which are >= 0, and not
-0.0, whose bits are those of no rank. The bits of a value must not depend on how the unit is divided into blocks."""
