"""Hashes of files, and a memory for those of large ones."""

import hashlib
import json
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeAlias

from blake3 import blake3

from neuromerge_hf.errors import MergeError
from neuromerge_hf.storage.file_state import state_of
from neuromerge_hf.storage.paths import user_cache
from neuromerge_hf.storage.writing import write_file

Algorithm: TypeAlias = Literal["blake3", "sha256"]
"""BLAKE3 takes two fifths of the time. The Hub and the recipes of earlier versions have SHA-256."""

CHUNK = 1 << 20
"""How many bytes are read at a time."""

REMEMBERED = 1 << 26
"""The size in bytes from which on a file's hash is remembered. Hashing this many takes 15 ms."""

SETTLED = 10
"""How many seconds a file must be unchanged before its hash is remembered. Some file systems count time in seconds."""


def file_hash(path: Path, algorithm: Algorithm = "sha256", stopped: threading.Event | None = None) -> str:
    """The hash of a file in hexadecimal. If `stopped` is set, reading ends early and the hash is incomplete."""
    digest: Any = blake3() if algorithm == "blake3" else hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while (count := file.readinto(buffer)) and not (stopped and stopped.is_set()):
            digest.update(buffer[:count])
    return digest.hexdigest()


def remembered_hash(path: Path, algorithm: Algorithm, stopped: threading.Event | None = None) -> str:
    """The hash of a file. That of a large file is kept in the user's cache, and the file is not read again.

    It is known by the path, the inode, the size and the times of the file, the last of which (ctime) nobody can set.
    See `file_hash`.
    """
    state = state_of(path)
    if state is None or state[0][2] < REMEMBERED:
        return file_hash(path, algorithm, stopped)
    known = {"path": str(path.absolute()), "algorithm": algorithm, "state": [list(each[1:]) for each in state]}
    memory = user_cache() / "hashes" / f"{blake3(f'{algorithm} {path.absolute()}'.encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, KeyError, AttributeError):  # there is none, or it is damaged
        found = json.loads(memory.read_text(encoding="utf-8"))
        if {name: found.get(name) for name in known} == known:
            return str(found["hash"])
    started = time.time_ns()
    digest = file_hash(path, algorithm, stopped)
    is_settled = max(max(each[3:]) for each in state) < started - SETTLED * 10**9
    if is_settled and state_of(path) == state and not (stopped and stopped.is_set()):
        with suppress(OSError, MergeError):  # a cache that cannot be written to is none
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_file(memory, json.dumps({**known, "hash": digest}) + "\n")
    return digest
