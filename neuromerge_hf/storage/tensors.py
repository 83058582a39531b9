"""Tensors in weight files. Their headers give names, dtypes and shapes, and their entries are read in ranges."""

import math
import os
import threading
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from neuromerge_hf.errors import MergeError
from neuromerge_hf.storage.layout import Block, Layout

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
"""The torch dtype of each dtype name in a safetensors header."""

FORMAT_NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""The name of each torch dtype in a safetensors header."""


MERGEABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that can be merged. Tensors of other dtypes are copied from the base."""


WHOLE_ROW = 1 << 17
"""The size in bytes up to which a row is read whole for some of its columns. A call takes as long as reading that."""

ROWS_BYTES = 1 << 20
"""How many bytes of such rows are read at a time."""


class StoredTensor(Protocol):
    """A tensor in a weight file. Its name, dtype and shape are known before its entries are read."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def path(self) -> Path: ...

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Read the entries [start, stop) of the flattened tensor into `out`, a 1-D CPU tensor of this dtype."""
        ...


def read_rows(tensor: StoredTensor, layout: Layout, block: Block, buffer: Tensor | None = None) -> Tensor:
    """Read the neurons of a block.

    Args:
        buffer: uint8 CPU memory to read into. The result may be a view of it, valid until the caller reuses it.

    Returns:
        (len(block), layout.width) on the CPU, in the dtype of the tensor.
    """
    count = len(block) * layout.width
    if buffer is None:
        flat = torch.empty(count, dtype=tensor.dtype)
    else:
        flat = buffer[: count * tensor.dtype.itemsize].view(tensor.dtype)
    row = layout.neurons * layout.after
    if layout.before > 1 and 0 < row * tensor.dtype.itemsize <= WHOLE_ROW:
        _read_columns(tensor, layout, block, row, flat.view(layout.before, -1))
        return layout.to_rows(flat, block)
    position = 0
    for start, stop in layout.runs(block):
        tensor.read(start, stop, flat[position : position + stop - start])
        position += stop - start
    return layout.to_rows(flat, block)


def _read_columns(tensor: StoredTensor, layout: Layout, block: Block, row: int, out: Tensor) -> None:
    """Read a block of neurons that lie in columns, by reading whole rows of the tensor, many at a time."""
    columns = slice(block.start * layout.after, block.stop * layout.after)
    first = block.batch * layout.before
    many = torch.empty(
        min(layout.before, max(1, ROWS_BYTES // (row * tensor.dtype.itemsize))) * row, dtype=tensor.dtype
    )
    for part in out.split(len(many) // row):
        rows = many[: len(part) * row]
        tensor.read(first * row, (first + len(part)) * row, rows)
        part.copy_(rows.view(len(part), row)[:, columns])
        first += len(part)


def read_whole(tensor: StoredTensor) -> Tensor:
    """Read a whole tensor to the CPU. A tensor that is not downloaded yet becomes a meta tensor."""
    if isinstance(tensor, RemoteTensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    out = torch.empty(tensor.shape, dtype=tensor.dtype)
    tensor.read(0, out.numel(), out.view(-1))
    return out


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file. Any number of threads may read it at once."""

    path: Path
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @cached_property
    def descriptor(self) -> int:
        """The file descriptor. It is opened at its first use and closed with this object."""
        return os.open(self.path, os.O_RDONLY)

    def pread(self, offset: int, out: Tensor) -> None:
        """Fill `out` (contiguous, CPU) with the bytes from `offset` on.

        Raises:
            MergeError: if the file ends early, or cannot be read.
        """
        view = memoryview(out.view(torch.uint8).numpy().data)
        try:
            with self._lock:
                descriptor = self.descriptor
            while view:
                count = os.preadv(descriptor, [view], offset)
                if count == 0:
                    raise MergeError(f"{self.path} ended early: it changed while it was read. Run the merge again.")
                view, offset = view[count:], offset + count
        except OSError as error:
            raise MergeError(f"{self.path} cannot be read ({error.strerror}). Check the file and its disk.") from error

    def __del__(self) -> None:
        if "descriptor" in self.__dict__:
            os.close(self.descriptor)


@dataclass(frozen=True)
class SafetensorsTensor:
    """A tensor of a safetensors file. `offset` is the position of its first byte in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: SafetensorsFile
    offset: int

    @property
    def path(self) -> Path:
        return self.file.path

    def read(self, start: int, stop: int, out: Tensor) -> None:
        self.file.pread(self.offset + start * self.dtype.itemsize, out)


@dataclass(frozen=True)
class RemoteTensor:
    """A tensor in a file that is not downloaded yet. `path` is where the download will put the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path

    def read(self, start: int, stop: int, out: Tensor) -> None:
        raise RuntimeError(f"{self.path} is read before it is downloaded")


def is_remote(tensor: StoredTensor) -> bool:
    """Whether a tensor is in a file that is not downloaded yet."""
    # An AlignedTensor reads its rows from its attribute `tensor`.
    return any(isinstance(one, RemoteTensor) for one in (tensor, getattr(tensor, "tensor", None)))


@dataclass(frozen=True)
class StridedTensor:
    """A tensor whose entries do not follow each other in the file, such as the transpose of one in a ``.bin`` file.

    Attributes:
        stride: how many entries to go on in the file for the next index of each axis.
        offset: the position of its first entry in the file, in bytes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    file: SafetensorsFile
    offset: int

    @property
    def path(self) -> Path:
        return self.file.path

    def read(self, start: int, stop: int, out: Tensor) -> None:
        # All that lies between the first and the last entry of the slices along the first axis is read.
        if start == stop:
            return
        entries = math.prod(self.shape[1:])
        first, last = start // entries, -(-stop // entries)
        shape = (last - first, *self.shape[1:])
        span = 1 + sum((length - 1) * step for length, step in zip(shape, self.stride, strict=True))
        between = torch.empty(span, dtype=self.dtype)
        self.file.pread(self.offset + first * self.stride[0] * self.dtype.itemsize, between)
        slices = between.as_strided(shape, self.stride).reshape(-1)
        out.copy_(slices[start - first * entries : stop - first * entries])


@dataclass(frozen=True)
class MemoryTensor:
    """A tensor in memory: of a model there, or from a ``.bin`` file of torch < 1.6. `path` is for messages."""

    name: str
    tensor: Tensor
    path: Path

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        out.copy_(self.tensor.reshape(-1)[start:stop])
