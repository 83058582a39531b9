"""One expert's change of one tensor of the base, formed a block of neurons at a time."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from neuromerge_hf.layout import Block, Layout
from neuromerge_hf.tensors import StoredTensor, read_rows


class TaskVector(Protocol):
    """``tau_t = theta_t - theta_0`` of one stored tensor."""

    @property
    def needs_base(self) -> bool:
        """Whether `write` reads its argument `base`."""
        ...

    @property
    def file(self) -> str:
        """The file that it comes from, for messages."""
        ...

    @property
    def bytes_read(self) -> int:
        """How much one pass over all blocks reads."""
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

    needs_base = True

    @property
    def file(self) -> str:
        return str(self.tensor.path)

    @property
    def bytes_read(self) -> int:
        return self.layout.rows * self.layout.width * self.tensor.dtype.itemsize

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
    """

    left: Tensor
    right: Tensor
    layout: Layout
    file: str
    stored: TaskVector | None = None

    @property
    def needs_base(self) -> bool:
        return self.stored is not None

    @property
    def bytes_read(self) -> int:
        return self.stored.bytes_read if self.stored else 0

    def write(self, out: Tensor, block: Block, base: Tensor, buffer: Tensor) -> None:
        first = block.batch * self.layout.neurons
        left = self.left[first + block.start : first + block.stop]
        product = torch.mm(left.to(out.device), self.right.to(out.device))
        if self.stored:
            self.stored.write(out, block, base, buffer)
            out.add_(product)
        else:
            out.copy_(product)
