"""Reading a plan's units block by block, on several threads, in reused memory."""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from neuromerge_hf.errors import MergeError
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.layout import Block
from neuromerge_hf.storage.tensors import read_rows

BLOCK_ENTRIES = 1 << 20
"""How many entries of a tensor are worked on at a time. Threads that return to Python too often wait for each other."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Memory(threading.local):
    """Memory that each thread reuses from one block to the next."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised 1-D tensor, valid until the same name is taken again on this thread."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < count or buffer.dtype != dtype:
            buffer = self._buffers[name] = torch.empty(count, dtype=dtype, device=device)
        return buffer[:count]


def load_base(unit: Unit, block: Block, memory: Memory, device: torch.device) -> Tensor:
    """A block of the base, (neurons, width) float32, valid until the next call on the same thread."""
    x = memory.take("x", len(block) * unit.layout.width, torch.float32, device).view(len(block), unit.layout.width)
    return x.copy_(read_rows(unit.tensor, unit.layout, block, _raw(unit, block, memory)))


def load_block(unit: Unit, block: Block, memory: Memory, device: torch.device) -> Tensor:
    """A block of the base and of the task vectors of the experts that change it: (1 + T, neurons, width) float32.

    The result is valid until the next call on the same thread.
    """
    vectors = [vector for vector in unit.task_vectors if vector]
    shape = 1 + len(vectors), len(block), unit.layout.width
    x = memory.take("x", math.prod(shape), torch.float32, device).view(shape)
    raw = _raw(unit, block, memory)
    x[0].copy_(read_rows(unit.tensor, unit.layout, block, raw))
    for task_vector, vector in zip(x[1:], vectors, strict=True):
        vector.write(task_vector, block, x[0], raw)
    return x


def _raw(unit: Unit, block: Block, memory: Memory) -> Tensor:
    # float64 is the widest dtype that a file may hold
    return memory.take("raw", len(block) * unit.layout.width * 8, torch.uint8, torch.device("cpu"))


def non_finite(unit: Unit, block: Block, experts: list[str], device: torch.device) -> MergeError:
    """The error for a block that holds a NaN or an infinity, naming the first source of it."""
    x = load_block(unit, block, Memory(), device)
    names = [expert for expert, vector in zip(experts, unit.task_vectors, strict=True) if vector]
    files = [str(unit.tensor.path), *(vector.file for vector in unit.task_vectors if vector)]
    for t, (name, file) in enumerate(zip(["the base model", *names], files, strict=True)):
        if not x[t].isfinite().all():
            return MergeError(
                f"{unit.parameter} of {name} holds a NaN or an infinity ({file}). "
                "A damaged model cannot be merged: train or download it again, or leave it out."
            )
    return MergeError(f"{unit.parameter}: the task vectors are too large for float32.")


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Like `map`, on threads that each take whole items; the results come in the order of the items.

    At most a few items are ahead of the one that is waited for. torch's own operations run on one thread meanwhile:
    threads that each take whole blocks beat one operation that is split over threads.
    """
    # Every thread is told: MKL counts for each thread by itself, and torch passes its own count on only in some
    # operations, without which a thread's first matrix products would be split, with other last bits.
    workers = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    with single_threaded_torch(), workers as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """torch's operations run on one thread each, in this thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
