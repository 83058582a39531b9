"""One expert's change of one tensor of the base, formed a block of neurons at a time."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from neuromerge_hf.storage.layout import Block, Layout
from neuromerge_hf.storage.tensors import StoredTensor, read_rows

TILE = 64
"""How many rows of a low-rank product are formed at a time, counted from the tensor's first.

The last bits of a matrix product depend on how many rows are formed at once, and on where they are in memory if that is
not aligned to 64 bytes (torch aligns what it allocates). In tiles, a row has the same bits in every block.
"""


class TaskVector(Protocol):
    """``tau_t = theta_t - theta_0`` of one stored tensor."""

    @property
    def file(self) -> str:
        """The file that it comes from, for messages."""
        ...

    @property
    def bytes_read(self) -> int:
        """How much one pass over all blocks reads."""
        ...

    def opened(self) -> "TaskVector":
        """The same, with what all blocks of the tensor share read into memory."""
        ...

    def write(self, out: Tensor, block: Block, base: Tensor, buffer: Tensor) -> None:
        """Fill `out` with the task vector of a block of neurons.

        Args:
            out: (neurons, width) float32, on any device; its rows are contiguous.
            block: which neurons.
            base: the base's weights of the block, like `out`.
            buffer: uint8 memory on the CPU for the block in the expert's dtype.
        """
        ...


@dataclass(frozen=True)
class Difference:
    """The task vector of a tensor that the expert stores in full."""

    tensor: StoredTensor
    layout: Layout

    @property
    def file(self) -> str:
        return str(self.tensor.path)

    @property
    def bytes_read(self) -> int:
        return self.layout.rows * self.layout.width * self.tensor.dtype.itemsize

    def opened(self) -> "Difference":
        return self

    def write(self, out: Tensor, block: Block, base: Tensor, buffer: Tensor) -> None:
        out.copy_(read_rows(self.tensor, self.layout, block, buffer))
        out.sub_(base)


@dataclass(frozen=True)
class LowRank:
    """The task vector ``left @ right`` of a LoRA adapter, of which only the rows that are asked for are ever formed.

    Attributes:
        left: (rows, r) float32, the scaling included: one row for each neuron of the layout.
        right: (r, width) float32.
        file: the adapter's weight file.
        stored: the change of the weight under the factors, where the adapter holds that as well.
        factor_bytes: the size of the factors in the file.
    """

    left: Tensor
    right: Tensor
    layout: Layout
    file: str
    stored: TaskVector | None = None
    factor_bytes: int = 0

    @property
    def bytes_read(self) -> int:
        return self.factor_bytes + (self.stored.bytes_read if self.stored else 0)

    def opened(self) -> "LowRank":
        return self

    def write(self, out: Tensor, block: Block, base: Tensor, buffer: Tensor) -> None:
        if self.stored:
            self.stored.write(out, block, base, buffer)
        first = block.batch * self.layout.neurons + block.start
        last = first + len(block)
        tiles = range(first // TILE * TILE, last, TILE)
        left, right = self.left[tiles.start : tiles[-1] + TILE].to(out.device), self.right.to(out.device)
        for begin, tile in zip(tiles, left.split(TILE), strict=True):
            product = torch.mm(tile, right)
            start, stop = max(first, begin), min(last, begin + TILE)
            formed, target = product[start - begin : stop - begin], out[start - first : stop - first]
            if self.stored:
                target.add_(formed)
            else:
                target.copy_(formed)
