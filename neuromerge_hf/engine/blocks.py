"""Loads the blocks of a unit into buffers that each thread reuses."""

import math
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from neuromerge_hf.errors import MergeError
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.finite import is_finite, largest_finite
from neuromerge_hf.storage.layout import Block
from neuromerge_hf.storage.tensors import read_rows


class Memory(threading.local):
    """Buffers that each thread reuses from one block to the next."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised 1-D tensor. It is valid until this thread takes the same name again."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < count or buffer.dtype != dtype:
            buffer = self._buffers[name] = torch.empty(count, dtype=dtype, device=device)
        return buffer[:count]


def load_base(unit: Unit, block: Block, memory: Memory, device: torch.device, buffer: str = "x") -> Tensor:
    """Load a block of the base: (neurons, width) float32 on `device`.

    It is valid until the thread loads another block into the same buffer. By default that is the one of `load_block`.
    """
    x = memory.take(buffer, len(block) * unit.layout.width, torch.float32, device).view(len(block), unit.layout.width)
    return x.copy_(read_rows(unit.tensor, unit.layout, block, _raw_bytes(unit, block, memory)))


def load_block(unit: Unit, block: Block, memory: Memory, device: torch.device) -> Tensor:
    """Load a block of the base and of the task vectors of the experts that change it.

    Returns:
        (1 + T, neurons, width) float32 on `device`, valid until the thread loads another block.
    """
    vectors = [vector for vector in unit.task_vectors if vector]
    shape = 1 + len(vectors), len(block), unit.layout.width
    x = memory.take("x", math.prod(shape), torch.float32, device).view(shape)
    raw = _raw_bytes(unit, block, memory)
    x[0].copy_(read_rows(unit.tensor, unit.layout, block, raw))
    for task_vector, vector in zip(x[1:], vectors, strict=True):
        vector.write(task_vector, block, x[0], raw)
    return x


def load_task_vector(unit: Unit, expert: int, block: Block, out: Tensor, memory: Memory) -> None:
    """Load a block of one expert's task vector into `out`: (neurons, width) float32, with contiguous rows."""
    vector = unit.task_vectors[expert]
    assert vector, "only experts that change the unit have a task vector"
    base = load_base(unit, block, memory, out.device)
    vector.write(out, block, base, _raw_bytes(unit, block, memory))


def _raw_bytes(unit: Unit, block: Block, memory: Memory) -> Tensor:
    # 8 bytes an entry: float64 is the widest dtype that a file may hold
    return memory.take("raw", len(block) * unit.layout.width * 8, torch.uint8, torch.device("cpu"))


def non_finite(unit: Unit, block: Block, experts: Sequence[str], device: torch.device) -> MergeError:
    """Return the error for a block that holds a NaN or an infinity. It names the first model that holds one."""
    x = load_block(unit, block, Memory(), device)
    changing = [(expert, vector) for expert, vector in zip(experts, unit.task_vectors, strict=False) if vector]
    if not is_finite(x[0]):
        stored = read_rows(unit.tensor, unit.layout, block)
        return _damaged(unit, "the base model", unit.tensor.path, is_too_large=is_finite(stored))
    for task_vector, (expert, vector) in zip(x[1:], changing, strict=True):
        if not is_finite(task_vector):
            factors = vector.low_rank()
            is_too_large = factors is not None and is_finite(factors.left) and is_finite(factors.right)
            return _damaged(unit, expert, vector.file, is_too_large=is_too_large)
    return MergeError(
        f"{unit.parameter} of the merged model would not be finite, although it is in every model: the merged change "
        "exceeds float32, in which merges are computed. Use a smaller lambda or scale, or leave out a model with "
        f"values as large as {largest_finite(x):.3g}."
    )


def _damaged(unit: Unit, model: str, file: str | Path, *, is_too_large: bool) -> MergeError:
    if is_too_large:
        return MergeError(
            f"{unit.parameter} of {model} exceeds float32, in which merges are computed ({file}). Train or download "
            "the model again, or leave it out."
        )
    meant = f' If it is meant, as in a mask, keep the base\'s: exclude=("{unit.parameter}",).' if unit.is_buffer else ""
    return MergeError(
        f"{unit.parameter} of {model} holds a NaN or an infinity ({file}). "
        f"A damaged model cannot be merged: train or download it again, or leave it out.{meant}"
    )
