"""Values of tensors that wait in a file while the tensors hold others."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import torch
from torch import Tensor

from neuromerge_hf.callbacks.common.processes import on_every_process
from neuromerge_hf.errors import MergeError
from neuromerge_hf.text import readable_size


class WeightsLostError(RuntimeError):
    """The model in training has other weights than it was trained to have. No training can go on with them."""


@contextmanager
def parked(tensors: Sequence[Tensor], folder: Path) -> Iterator[None]:
    """Restore the values of tensors, bit by bit, after the block. Every process must call this, for its own tensors.

    Args:
        tensors: tensors of any dtype on any device. They do not overlap.
        folder: where the file is that keeps the values. No other program sees it, and it is gone when this one is.

    Raises:
        MergeError: if the file of any process cannot be written. The block does not run then.
        WeightsLostError: if the file cannot be read any more.
    """
    with ExitStack() as stack:
        file = on_every_process(lambda: stack.enter_context(_written(tensors, folder)))
        try:
            yield
        finally:
            _restore_all(tensors, file)


def _written(tensors: Sequence[Tensor], folder: Path) -> IO[bytes]:
    """A file without a name that holds the bytes of all tensors."""
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(TemporaryFile(dir=folder, buffering=0))
            for tensor in tensors:
                _write(file.fileno(), bytes_of(tensor.detach().cpu()))
        except OSError as error:
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            raise MergeError(
                f"The weights of the model in training ({readable_size(size)}) cannot be put aside in {folder}: "
                f"{error.strerror}. Give the callback an output_dir on another disk, or pass evaluate=False."
            ) from error
        stack.pop_all()  # the file stays open
    return file


@torch.no_grad()
def _restore_all(tensors: Sequence[Tensor], file: IO[bytes]) -> None:
    try:
        file.seek(0)
        for tensor in tensors:
            _restore(file.fileno(), tensor)
    except (OSError, EOFError) as error:
        raise WeightsLostError(
            f"The weights of the model in training cannot be read back from the disk ({error}). Training cannot go on: "
            "resume it from a checkpoint."
        ) from error


def _restore(descriptor: int, tensor: Tensor) -> None:
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        _read(descriptor, bytes_of(tensor.detach()))
        return
    values = torch.empty(tensor.shape, dtype=tensor.dtype)
    _read(descriptor, bytes_of(values))
    tensor.copy_(values)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a tensor on the CPU; of a copy if it is not contiguous."""
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write(descriptor: int, view: memoryview) -> None:
    while view:
        view = view[os.write(descriptor, view) :]


def _read(descriptor: int, view: memoryview) -> None:
    while view:
        count = os.readv(descriptor, [view])
        if count == 0:
            raise EOFError("the file ended early")
        view = view[count:]
