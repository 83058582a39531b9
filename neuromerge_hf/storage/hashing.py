"""Hashes of files."""

import hashlib
import threading
from pathlib import Path


def file_hash(path: Path, stopped: threading.Event | None = None) -> str:
    """The sha256 of a file in hexadecimal. If `stopped` is set, reading ends early and the hash is incomplete."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while (count := file.readinto(buffer)) and not (stopped and stopped.is_set()):
            digest.update(buffer[:count])
    return digest.hexdigest()
