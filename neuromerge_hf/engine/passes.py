"""Passes over the inputs of a merge: unit by unit, block by block, in order, on threads, with progress."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import TypeVar

import torch

from neuromerge_hf.engine.blocks import Memory, non_finite
from neuromerge_hf.engine.cpu_kernel import CPUKernel
from neuromerge_hf.sources.unit import Unit, Work
from neuromerge_hf.storage.layout import Block

BLOCK_ENTRIES = 1 << 20
"""How many entries of a tensor a block has. With smaller blocks, threads often wait for Python's lock."""

Item = TypeVar("Item")
Result = TypeVar("Result")

Start = Callable[[Unit], tuple[Iterable[Block], Callable[[Block], Result]]]
"""A function that is called once with each opened unit. It returns the unit's blocks and a function to process one."""


def _ignore(_: int) -> None:
    pass


@dataclass(frozen=True)
class Passes:
    """How passes over the inputs are run.

    Attributes:
        work: the units and the experts.
        device: where blocks are loaded and computed.
        threads: how many blocks are processed at once.
        advance: called with the number of bytes that were read since the last call.
        block_entries: how many entries of a tensor a block has. No result depends on it.
        memory: the buffers that blocks are loaded into.
        kernel: the compiled kernel; None if torch computes everything.
    """

    work: Work
    device: torch.device
    threads: int = 1
    advance: Callable[[int], object] = _ignore
    block_entries: int = BLOCK_ENTRIES
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)
    kernel: CPUKernel | None = None

    def blocks(self, unit: Unit) -> Iterator[Block]:
        """Return all blocks of a unit."""
        return unit.layout.blocks(self.block_entries)

    def run(self, start: Start[Result], units: Iterable[Unit] | None = None) -> Iterator[tuple[Unit, Iterator[Result]]]:
        """Make one pass: process the blocks of units on threads, and yield the results in order.

        Args:
            start: called with each unit on the calling thread. The function that it returns is called on other threads.
            units: the units of the pass; by default all units of the work.

        Yields:
            Each unit that has blocks, opened, with the results of its blocks. Take all results of a unit before the
            next unit.

        Raises:
            MergeError: if processing a block raises a `FloatingPointError`. It names the source of the NaN or infinity.
        """
        results = self._results(start, self.work.units if units is None else units)
        for unit, found in groupby(results, key=itemgetter(0)):
            yield unit, (result for _, result in found)

    def _results(self, start: Start[Result], units: Iterable[Unit]) -> Iterator[tuple[Unit, Result]]:
        def items() -> Iterator[tuple[Unit, Block, Callable[[Block], Result]]]:
            for unit in map(Unit.opened, units):
                blocks, process = start(unit)
                for block in blocks:
                    yield unit, block, process

        def process_item(item: tuple[Unit, Block, Callable[[Block], Result]]) -> tuple[Unit, Block, Result]:
            unit, block, process = item
            try:
                return unit, block, process(block)
            except FloatingPointError:
                raise non_finite(unit, block, self.work.expert_names, self.device) from None

        for unit, block, result in _map_in_order(process_item, items(), self.threads):
            yield unit, result
            first = block.batch * unit.layout.neurons + block.start
            done, doing = (unit.bytes_read * rows // unit.layout.rows for rows in (first, first + len(block)))
            self.advance(doing - done)  # the sum over all blocks is exact


def _map_in_order(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Map a function over items on threads, and yield the results in the order of the items.

    At most ``2 * threads`` items are ahead of the next result, which bounds the memory. Each torch operation runs on
    one thread meanwhile, because threads with blocks of their own are faster than operations split over threads.
    """
    # MKL has a thread count for each thread, and torch sets it only in some operations. Without the initializer, a
    # thread's first matrix products would be split, with other last bits.
    workers = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    with _single_threaded_torch(), workers as pool:
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
def _single_threaded_torch() -> Iterator[None]:
    """Run each torch operation of the calling thread on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
