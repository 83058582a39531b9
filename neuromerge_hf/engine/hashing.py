"""The sha256 of a file that is written in any order. Bytes are hashed as soon as all bytes before them are written."""

import os
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Executor, Future
from hashlib import sha256

CHUNK = 1 << 20
"""How many bytes are read at a time."""

STEP = 1 << 26
"""How many bytes one task of the pool hashes. A merge that fails waits for at most one such task."""


class FileHasher:
    """Hashes one file in the background, from its first byte on, while it is written.

    Bytes are read back from the system's page cache soon after they are written, so hashing does not wait for a disk.

    Args:
        descriptor: the file, open for reading.
        sizes: the size in bytes of each part of the file, by its name. The parts follow each other without gaps.
        pool: an executor with one thread, which hashes the parts in the order of their submission.
    """

    def __init__(self, descriptor: int, sizes: Mapping[str, int], pool: Executor):
        self._descriptor = descriptor
        self._waiting = deque(sizes.items())
        self._finished = {name for name, size in sizes.items() if size == 0}
        self._pool = pool
        self._digest = sha256()
        self._ready = 0
        self._futures: list[Future[None]] = []

    @property
    def is_complete(self) -> bool:
        """Whether all parts are written. Some of them may not be hashed yet."""
        return not self._waiting

    def finish(self, name: str) -> None:
        """Mark a part as completely written. Only one thread may call this."""
        self._finished.add(name)
        start = self._ready
        while self._waiting and self._waiting[0][0] in self._finished:
            self._ready += self._waiting.popleft()[1]
        for begin in range(start, self._ready, STEP):
            self._futures.append(self._pool.submit(self._update, begin, min(begin + STEP, self._ready)))

    def hexdigest(self) -> str:
        """Wait until a complete file is hashed, and return its sha256."""
        for future in self._futures:
            future.result()
        return self._digest.hexdigest()

    def _update(self, start: int, stop: int) -> None:
        buffer = memoryview(bytearray(min(CHUNK, stop - start)))
        while start < stop:
            count = os.preadv(self._descriptor, [buffer[: stop - start]], start)
            if count == 0:
                raise OSError("a weight file became shorter while it was written")
            self._digest.update(buffer[:count])
            start += count
