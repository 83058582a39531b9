"""Writing files that a user may own. If the process is killed, the old file is there or the new one.

Each is written to a temporary file beside its place, synced to the disk, and renamed.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from neuromerge_hf.errors import MergeError
from neuromerge_hf.storage.temporary import temporary_file


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file, whose permissions stay if it exists. A link is replaced by a file.

    Raises:
        MergeError: if it cannot be written. The old file is then unchanged.
    """
    data = content.encode() if isinstance(content, str) else content
    with _replacing(path) as file:
        file.write(data)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, unless source and target are the same file. See `write_file`."""
    if not (target.exists() and target.samefile(source)):
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as original, _replacing(target) as file:
            shutil.copyfileobj(original, file, 1 << 20)


def sync_folder(folder: Path) -> None:
    """Sync a folder and everything in it to the disk."""
    for path, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not os.path.islink(os.path.join(path, name)):
                sync(Path(path, name))
        sync(Path(path))


def sync(path: Path) -> None:
    """Sync a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system syncs folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    try:
        with temporary_file(path) as file:
            yield file
            file.flush()
            if path.is_file() and not path.is_symlink():
                _take_permissions(file, path)
            os.fsync(file.fileno())
            os.replace(file.name, path)
        sync(path.parent)
    except OSError as error:
        raise MergeError(f"{path} cannot be written: {error.strerror or error}. It is as it was before.") from error


def _take_permissions(file: BinaryIO, old: Path) -> None:
    found = old.stat()
    with suppress(OSError):  # only root may give files away
        os.fchown(file.fileno(), found.st_uid, found.st_gid)
    with suppress(OSError):  # not every file system has permissions
        os.fchmod(file.fileno(), found.st_mode & 0o7777)
