"""Temporary files and folders beside what they become, and what processes that were killed left of them.

Their names start with a dot and tell the machine. A lock shows whether the process that makes one is alive. The system
drops it with the process, so it is right also if a process id is used again, or if a container has ids of its own.
"""

import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

LOCK, FILE, OLD = ".lock", ".tmp", ".old"
"""The suffixes of a temporary folder's lock, of a temporary file, which is its own lock, and of a replaced folder."""

NAME = re.compile(rf"\.(?P<target>.+)-(?P<machine>[0-9a-f]{{6}})-[0-9a-f]{{8}}(?P<suffix>{LOCK}|{FILE})", re.DOTALL)

FOREIGN_AGE = 24 * 3600
"""The seconds after which what another machine left is removed. Some network file systems do not share locks."""


@contextmanager
def temporary_file(target: Path) -> Iterator[BinaryIO]:
    """Yield a new file beside `target`, open for writing. It is removed afterwards, unless it was renamed.

    What killed processes left beside `target` is removed first.
    """
    with _locked(target, FILE) as file:
        yield file


@contextmanager
def temporary_path(target: Path) -> Iterator[Path]:
    """Yield an unused path beside `target` for a folder, which is removed afterwards, unless it was renamed.

    What killed processes left beside `target` is removed first.
    """
    with _locked(target, LOCK) as file:
        path = Path(file.name.removesuffix(LOCK))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def old_path(temporary: Path) -> Path:
    """The path for the folder that a temporary one replaces, where the two cannot be exchanged in one step."""
    return temporary.with_name(temporary.name + OLD)


def is_temporary_file(name: str) -> bool:
    """Whether a file has the name of a temporary file."""
    found = NAME.fullmatch(name)
    return found is not None and found["suffix"] == FILE


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left in a folder. If one was replacing a folder, the old one gets its name back."""
    try:
        names = [name for name in os.listdir(folder) if NAME.fullmatch(name)]
    except OSError:
        return
    for name in names:
        with suppress(OSError), (folder / name).open("r+b") as lock:  # the process is alive, or another user's
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(folder / name)


@contextmanager
def _locked(target: Path, suffix: str) -> Iterator[BinaryIO]:
    """Yield a new file beside `target`, locked and open for writing. It is removed afterwards."""
    remove_leftovers(target.parent)
    path = target
    try:
        while True:
            # The path is known before the file exists, so that cleaning up cannot miss it.
            path = target.with_name(f".{target.name}-{_machine()}-{secrets.token_hex(4)}{suffix}")
            with path.open("xb") as file:
                with suppress(OSError):  # not every file system has locks; then no process removes leftovers either
                    fcntl.flock(file, fcntl.LOCK_EX)
                if os.fstat(file.fileno()).st_nlink:  # else another process removed it before it was locked
                    yield file
                    return
    finally:
        if path != target and not any(each.exists() for each in _folders_of(path)):  # else a later process finds them
            path.unlink(missing_ok=True)


def _remove(lock: Path) -> None:
    found = NAME.fullmatch(lock.name)
    assert found is not None
    if found["machine"] != _machine() and time.time() - _last_change(lock) < FOREIGN_AGE:
        return
    target, folders = lock.with_name(found["target"]), _folders_of(lock)
    if folders and folders[-1].is_dir() and not target.exists():
        folders[-1].rename(target)
        logger.warning("%s is restored: a process was killed while it replaced this folder.", target)
    for folder in folders:
        if folder.is_dir():
            shutil.rmtree(folder)
            logger.warning("%s is removed: a process that was killed left it.", folder)
    lock.unlink(missing_ok=True)


def _folders_of(lock: Path) -> list[Path]:
    """The temporary folder that a lock is for, and the folder that it replaces; none if it is a temporary file."""
    if not lock.name.endswith(LOCK):
        return []
    made = lock.with_name(lock.name.removesuffix(LOCK))
    return [made, old_path(made)]


def _last_change(lock: Path) -> float:
    """The time of the last change to a temporary file, or to any file in a temporary folder."""
    inside = [path for folder in _folders_of(lock) for path in (folder, *folder.rglob("*"))]
    return max(path.lstat().st_mtime for path in (lock, *inside) if path.exists())


def _machine() -> str:
    """Six digits that tell machines apart, and starts of one machine."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        boot = socket.gethostname()
    return hashlib.sha256(boot.encode()).hexdigest()[:6]
