"""The compiled kernel, if it is installed: `neuromerge_hf.compiled` on the tensors of blocks."""

import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from neuromerge_hf.engine.blocks import Memory, load_block
from neuromerge_hf.sources.task_vector import Difference
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.layout import Block
from neuromerge_hf.storage.tensors import read_rows

logger = logging.getLogger(__name__)


def kernel_name(device: str | int | None) -> str:
    """Return the name of the kernel that a merge on a device uses, "numba" or "torch", without loading it."""
    is_cpu = not torch.accelerator.is_available() if device is None else str(device).startswith("cpu")
    return "numba" if is_cpu and _is_installed() else "torch"


def _is_installed() -> bool:
    return importlib.util.find_spec("numba") is not None and os.environ.get("NUMBA_DISABLE_JIT", "0") == "0"


def stored_dtype(unit: Unit) -> torch.dtype:
    """Return the dtype in which the blocks of a unit are loaded for the compiled kernel.

    bfloat16 stands for the weights of the base and the experts as they are stored, and float32 for the base's weights
    and the task vectors.
    """
    tensors = [unit.tensor, *(vector.tensor for vector in unit.task_vectors if isinstance(vector, Difference))]
    is_whole = len(tensors) == 1 + len(unit.changing) and unit.layout.before == 1
    is_bfloat16 = is_whole and all(tensor.dtype == torch.bfloat16 for tensor in tensors)
    return torch.bfloat16 if is_bfloat16 else torch.float32


@dataclass(frozen=True, eq=False)
class Combination:
    """A merged block that is not formed yet: a linear combination of each neuron's rows.

    Attributes:
        kernel: the compiled kernel.
        x: (1 + T, neurons, width) bfloat16 or float32, see `CPUKernel.load`.
        thresholds: the trim thresholds of the T task vectors.
        coefficients: (neurons, 1 + T) float32; see `kernel.Election`.
    """

    kernel: "CPUKernel"
    x: Tensor
    thresholds: Sequence[float]
    coefficients: Tensor

    def to(self, dtype: torch.dtype) -> Tensor:
        """Return the merged rows, (neurons, width), in a dtype."""
        return self.kernel.combine(self.x, self.thresholds, self.coefficients, dtype)

    def __getitem__(self, neurons: slice) -> Tensor:
        """Return the merged rows of some neurons in float32."""
        part = self.x[:, neurons].contiguous()
        return self.kernel.combine(part, self.thresholds, self.coefficients[neurons], torch.float32)


class CPUKernel:
    """The functions of `neuromerge_hf.compiled` on tensors. Any number of threads may call them."""

    def __init__(self, compiled: ModuleType):
        self._compiled = compiled

    def prepare(self, dtypes: Iterable[tuple[torch.dtype, torch.dtype]]) -> None:
        """Compile the functions for some dtypes of blocks and of merged rows, or load them from numba's cache."""
        for stored, written in sorted(set(dtypes), key=str):
            x = torch.zeros(2, 1, 1, dtype=stored)
            self.count(x, 1, 0.0, 1.0, Memory())
            self.gram_matrix(x, [0.0])
            for dtype in {written, torch.float32}:
                self.combine(x, [0.0], torch.zeros(1, 2), dtype)

    def load(self, unit: Unit, block: Block, memory: Memory) -> Tensor:
        """Load a block: (1 + T, neurons, width) in the `stored_dtype`, valid until the thread loads another block."""
        if stored_dtype(unit) == torch.float32:
            return load_block(unit, block, memory, torch.device("cpu"))
        tensors = [unit.tensor, *(vector.tensor for vector in unit.task_vectors if isinstance(vector, Difference))]
        shape = len(tensors), len(block), unit.layout.width
        x = memory.take("stored", len(tensors) * len(block) * unit.layout.width, torch.bfloat16, torch.device("cpu"))
        for rows, tensor in zip(x.view(len(tensors), -1), tensors, strict=True):
            read_rows(tensor, unit.layout, block, rows.view(torch.uint8))
        return x.view(shape)

    def task_vectors(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the T task vectors of a block, see `load`: (neurons, width) float32."""
        if x.dtype == torch.float32:
            yield from x[1:]
        else:
            base = x[0].float()
            yield from (expert.float().sub_(base) for expert in x[1:])

    def gram_matrix(self, x: Tensor, thresholds: Sequence[float]) -> Tensor:
        """Do what `kernel.trim` and `kernel.gram_matrix` do: (neurons, 1 + T, 1 + T) float64.

        Args:
            x: a block, see `load`.
            thresholds: the trim thresholds of the T task vectors; 0 keeps everything.

        Raises:
            FloatingPointError: if `x` holds a NaN or an infinity.
        """
        gram = torch.empty(x.shape[1], len(x), len(x), dtype=torch.float64)
        self._compiled.gram_matrix(_array(x), np.array(thresholds, np.float32), gram.numpy())
        if not gram.isfinite().all():
            raise FloatingPointError("a weight is NaN or infinite")
        return gram

    def combine(self, x: Tensor, thresholds: Sequence[float], coefficients: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``w_0 + a @ X`` for each neuron with the trimmed rows X: (neurons, width) in a dtype.

        Args:
            x: a block, see `load`.
            thresholds: the trim thresholds of the T task vectors.
            coefficients: (neurons, 1 + T) float32, the numbers ``a``.
            dtype: the dtype of the result. It is rounded once.
        """
        merged = torch.empty(x.shape[1:], dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
        self._compiled.combine(_array(x), np.array(thresholds, np.float32), coefficients.numpy(), _array(merged))
        return merged.to(dtype)

    def count(self, x: Tensor, row: int, low: float, high: float, memory: Memory) -> tuple[int, Tensor, Tensor]:
        """Count the magnitudes of a task vector below a range, and find those in the range.

        Args:
            x: a block, see `load`.
            row: which row of the block, from 1 to T.
            low, high: the range [low, high).
            memory: buffers to reuse.

        Returns:
            The number of magnitudes below the range, the bits of those in it (int32, valid until the next call on this
            thread), and the L1 norms of all entries and of those not below the range: (2, neurons) float64.
        """
        found = memory.take("found", x[row].numel(), torch.int32, x.device)
        norms = torch.empty(2, x.shape[1], dtype=torch.float64)
        below, inside = self._compiled.count_magnitudes(
            _array(x), row, np.float32(low), np.float32(high), norms.numpy(), found.numpy()
        )
        return below, found[:inside], norms


def _array(x: Tensor) -> "np.ndarray":
    """The same memory as an array of float32, or of the bits of bfloat16."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def find_kernel(device: torch.device, units: Iterable[Unit]) -> CPUKernel | None:
    """Return the compiled kernel, ready for some units; None if it is not installed, or cannot be used on the device.

    ``NUMBA_DISABLE_JIT=1`` in the environment turns it off.
    """
    if device.type != "cpu":
        return None
    try:
        kernel = _load()
        if kernel:
            kernel.prepare((stored_dtype(unit), unit.dtype) for unit in units if unit.task_vectors)
        return kernel
    except Exception as error:  # of the compiler, or of its cache
        logger.warning("The compiled kernel cannot be used (%s). torch computes the merge, which takes longer.", error)
        return None


def _load() -> CPUKernel | None:
    if not _is_installed():
        return None
    from neuromerge_hf import compiled

    # numba read the environment when it was imported: functions that it did not wrap would be run by Python.
    return CPUKernel(compiled) if hasattr(compiled.gram_matrix, "py_func") else None
