"""The task vector of one expert for one tensor of the base, computed a block of neurons at a time."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from neuromerge_hf.kernel import ALIGNMENT
from neuromerge_hf.storage.layout import Block, Layout
from neuromerge_hf.storage.tensors import StoredTensor, read_rows

TILE = 64
"""The number of rows in a tile of a low-rank product. Tiles are counted from the tensor's first row.

The last bits of a matrix product depend on how many rows are computed at once, and on their address in memory if it is
not aligned to 64 bytes. In tiles, a row has the same bits in every block.
"""


class TaskVector(Protocol):
    """The task vector ``tau_t = theta_t - theta_0`` of one stored tensor."""

    @property
    def file(self) -> str:
        """The file that the task vector comes from, for messages."""
        ...

    @property
    def bytes_read(self) -> int:
        """The number of bytes that one pass over all blocks reads."""
        ...

    @property
    def rank(self) -> int:
        """The rank of its low-rank factors; 0 if there are none."""
        ...

    def opened(self) -> "TaskVector":
        """The same task vector, with the data that all blocks share read into memory."""
        ...

    def low_rank(self) -> "LowRank | None":
        """The factors in memory, if the whole task vector is their product; else None."""
        ...

    def write(self, out: Tensor, block: Block, base: Tensor, buffer: Tensor) -> None:
        """Write the task vector of a block of neurons to `out`.

        Args:
            out: (neurons, width) float32, on any device, with contiguous rows.
            block: the neurons to compute.
            base: the base's weights of the block, with the shape, dtype and device of `out`.
            buffer: uint8 memory on the CPU, large enough for the block in the expert's dtype.
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

    @property
    def rank(self) -> int:
        return 0

    def opened(self) -> "Difference":
        return self

    def low_rank(self) -> None:
        return None

    def write(self, out: Tensor, block: Block, base: Tensor, buffer: Tensor) -> None:
        out.copy_(read_rows(self.tensor, self.layout, block, buffer))
        out.sub_(base)


@dataclass(frozen=True)
class LowRank:
    """The task vector ``left @ right`` of a LoRA adapter. Only the tiles that hold a block's rows are computed.

    Attributes:
        left: (rows, r) float32, including the scaling, with one row for each neuron of the layout.
        right: (r, width) float32.
        file: the path of the adapter's weight file.
        stored: the task vector to which the product is added, if the adapter also stores the whole weight.
        factor_bytes: the size of the factors in the file, in bytes.
        tile: the number of rows that are computed at once. Only with `TILE` has a row the same bits in every block.
    """

    left: Tensor
    right: Tensor
    layout: Layout
    file: str
    stored: TaskVector | None = None
    factor_bytes: int = 0
    tile: int = TILE

    @property
    def bytes_read(self) -> int:
        return self.factor_bytes + (self.stored.bytes_read if self.stored else 0)

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def opened(self) -> "LowRank":
        return self

    def low_rank(self) -> "LowRank | None":
        return None if self.stored else self

    def write(self, out: Tensor, block: Block, base: Tensor, buffer: Tensor) -> None:
        if self.stored:
            self.stored.write(out, block, base, buffer)
        first = block.batch * self.layout.neurons + block.start
        last = first + len(block)
        tiles = range(first // self.tile * self.tile, last, self.tile)
        left, right = self.left[tiles.start : tiles[-1] + self.tile].to(out.device), self.right.to(out.device)
        for begin, tile in zip(tiles, left.split(self.tile), strict=True):
            start, stop = max(first, begin), min(last, begin + self.tile)
            target = out[start - first : stop - first]
            if len(target) == len(tile) and not self.stored and _is_aligned(target):
                torch.mm(tile, right, out=target)
                continue
            formed = torch.mm(tile, right)[start - begin : stop - begin]
            if self.stored:
                target.add_(formed)
            else:
                target.copy_(formed)


def _is_aligned(rows: Tensor) -> bool:
    """Whether rows are stored like those of a new tensor, so that a product has the same bits in them."""
    return rows.is_contiguous() and rows.data_ptr() % ALIGNMENT == 0
