"""Tensors that are computed into a temporary file before a merge, and then read like the tensors of a checkpoint."""

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from neuromerge_hf.storage.tensors import SafetensorsFile

Form = tuple[torch.dtype, tuple[int, ...]]
"""The dtype and the shape of a tensor."""


@dataclass(frozen=True)
class ComputedTensor:
    """A tensor of a `ComputedTensors`. `path` is the file that it is computed from, for messages."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    computed: "ComputedTensors"
    offset: int

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """See `StoredTensor.read`. The tensors must have been computed by `ComputedTensors.run`."""
        self.computed.file.pread(self.offset + start * self.dtype.itemsize, out)


class ComputedTensors:
    """The tensors that must be computed before a model can be read.

    Args:
        forms: the dtype and the shape of each tensor.
        compute: yields each tensor on the CPU, with its name. It runs once, before the first pass over the inputs.
        origin: the file that the tensors are computed from, for messages.
    """

    def __init__(
        self,
        forms: Mapping[str, Form],
        compute: Callable[[], Iterator[tuple[str, Tensor]]],
        origin: Path,
    ):
        self._compute = compute
        self._file: SafetensorsFile | None = None
        self.tensors: dict[str, ComputedTensor] = {}
        self.nbytes = 0
        for name, (dtype, shape) in forms.items():
            self.tensors[name] = ComputedTensor(name, dtype, shape, origin, self, self.nbytes)
            self.nbytes += prod(shape) * dtype.itemsize

    @property
    def file(self) -> SafetensorsFile:
        """The temporary file."""
        assert self._file is not None, "the tensors are not computed yet"
        return self._file

    def run(self, folder: Path) -> None:
        """Compute all tensors into a new file in `folder`."""
        path = folder / secrets.token_hex(8)
        missing = set(self.tensors)
        with path.open("xb") as file:
            for name, tensor in self._compute():
                declared = self.tensors[name]
                assert (tensor.dtype, tuple(tensor.shape)) == (declared.dtype, declared.shape), name
                file.seek(declared.offset)
                file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
                missing.remove(name)
            os.truncate(file.fileno(), self.nbytes)
        assert not missing, missing
        self._file = SafetensorsFile(path)
