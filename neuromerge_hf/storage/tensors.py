"""Tensors as they lie in checkpoint files: known by their header, read in stretches, never loaded whole."""

import json
import math
import os
import pickle
import threading
from collections.abc import Callable
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
"""The safetensors format's names of dtypes."""

MAX_HEADER = 100_000_000
"""The format's own limit, in bytes."""

MERGEABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class StoredTensor(Protocol):
    """A tensor in a file."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def path(self) -> Path: ...

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Fill `out`, 1-D and of this dtype on the CPU, with the entries [start, stop) of the flattened tensor."""
        ...


def read_rows(tensor: StoredTensor, layout: Layout, block: Block, buffer: Tensor | None = None) -> Tensor:
    """The neurons of a block, (len(block), layout.width), in the tensor's own dtype, on the CPU.

    Args:
        buffer: uint8 memory to read into, reused by the caller; the result is valid until its next use.
    """
    count = len(block) * layout.width
    if buffer is None:
        flat = torch.empty(count, dtype=tensor.dtype)
    else:
        flat = buffer[: count * tensor.dtype.itemsize].view(tensor.dtype)
    position = 0
    for start, stop in layout.runs(block):
        tensor.read(start, stop, flat[position : position + stop - start])
        position += stop - start
    return layout.to_rows(flat, block)


def read_whole(tensor: StoredTensor) -> Tensor:
    """The whole tensor, on the CPU: for small ones. One that is not downloaded yet is a meta tensor."""
    if isinstance(tensor, RemoteTensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    out = torch.empty(tensor.shape, dtype=tensor.dtype)
    tensor.read(0, out.numel(), out.view(-1))
    return out


@dataclass(frozen=True)
class SafetensorsFile:
    """An open safetensors file. Reading is safe from any number of threads."""

    path: Path
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @cached_property
    def descriptor(self) -> int:
        """The file descriptor, opened at the first use and closed with this object."""
        return os.open(self.path, os.O_RDONLY)

    def pread(self, offset: int, out: Tensor) -> None:
        """Fill `out` (contiguous, CPU) from the bytes at `offset`."""
        view = memoryview(out.view(torch.uint8).numpy().data)
        with self._lock:
            descriptor = self.descriptor
        while view:
            count = os.preadv(descriptor, [view], offset)
            if count == 0:
                raise MergeError(f"{self.path} ended early: it changed while it was read. Run the merge again.")
            view, offset = view[count:], offset + count

    def __del__(self) -> None:
        if "descriptor" in self.__dict__:
            os.close(self.descriptor)


@dataclass(frozen=True)
class SafetensorsTensor:
    """A tensor of a safetensors file; `offset` is its first byte in the file."""

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
    """A tensor on the Hub of which only the header is known; `path` is where its file will be."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path

    def read(self, start: int, stop: int, out: Tensor) -> None:
        raise RuntimeError(f"{self.path} is read before it is downloaded")


def is_remote(tensor: StoredTensor) -> bool:
    """Whether a tensor cannot be read before a download."""
    # `tensor` is what an AlignedTensor reads in another order.
    return any(isinstance(one, RemoteTensor) for one in (tensor, getattr(tensor, "tensor", None)))


@dataclass(frozen=True)
class PickledTensor:
    """A tensor of a ``.bin`` file, mapped into memory by torch."""

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


def open_safetensors(path: Path) -> dict[str, SafetensorsTensor]:
    """The tensors of a safetensors file, from its header alone.

    Raises:
        MergeError: if the file is truncated or is not a safetensors file.
    """
    opened = SafetensorsFile(path)
    with path.open("rb") as file:
        header = read_header(
            path, path.stat().st_size, lambda start, stop: os.pread(file.fileno(), stop - start, start)
        )
    return {
        name: SafetensorsTensor(name, dtype, shape, opened, offset) for name, (dtype, shape, offset) in header.items()
    }


def read_header(
    path: Path, size: int, read: Callable[[int, int], bytes]
) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
    """The dtype, the shape and the first byte of each tensor of a safetensors file.

    Args:
        path: the file, for messages.
        size: its size in bytes.
        read: gives the bytes [start, stop) of it; asked for the first 8, then for the header.

    Raises:
        MergeError: if the file is truncated or is not a safetensors file.
    """
    try:
        if size < 8:
            raise _truncated(path, size, "the length of its header alone has 8")
        start = read(0, 8)
        data = 8 + int.from_bytes(start, "little")
        if data - 8 > MAX_HEADER:
            raise ValueError(f"it starts with {start!r}, like a web page or a pointer of Git LFS")
        if data > size:
            raise _truncated(path, size, f"its header should have {data - 8} bytes")
        header = json.loads(read(8, data))
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            if end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"tensor {name} has {end - begin} bytes, not those of {dtype} {shape}")
            if data + end > size:
                raise _truncated(path, size, f"tensor {name} should end at byte {data + end}")
            tensors[name] = dtype, shape, data + begin
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, MergeError):
            raise
        raise MergeError(f"{path} is not a valid safetensors file ({error}). Download or save it again.") from error
    return tensors


def _truncated(path: Path, size: int, expectation: str) -> MergeError:
    return MergeError(f"{path} is truncated: it has {size} bytes, but {expectation}. Download or copy it again.")


def open_pickle(path: Path) -> dict[str, PickledTensor]:
    """The tensors of a ``.bin`` file. Nothing in it is executed: it is read with ``weights_only=True``.

    Raises:
        MergeError: if the file is damaged, or holds anything but tensors.
    """
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # The format of before torch 1.6 cannot be mapped.
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise MergeError(
            f"{path} is damaged or holds more than tensors, and torch.load(weights_only=True) refuses it; nothing in "
            "it was executed. Download it again, or save the model as safetensors."
        ) from error
    except Exception as error:  # torch.load documents no exception types
        raise MergeError(
            f"{path} cannot be read ({type(error).__name__}: {str(error).partition('. ')[0]}). "
            "It may be truncated: download or save it again."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise MergeError(f"{path} is not a state dict of tensors. Save the model again, with save_pretrained.")
    return {name: PickledTensor(name, tensor, path) for name, tensor in state.items()}
