"""Writing a directory atomically: it appears at its path only when it is complete."""

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from neuromerge_hf.errors import MergeError
from neuromerge_hf.folder.replaceable import FilesOf, check_replaceable, files_of_merge
from neuromerge_hf.storage.temporary import old_path, remove_leftovers, temporary_path
from neuromerge_hf.storage.writing import sync, sync_folder

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Arguments of Linux's renameat2."""

BROKEN = (errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.EROFS, errno.ETIMEDOUT)
"""Errors of a disk, or of the way to it."""

OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries in Rust, such as safetensors and tokenizers, write the number of a system's error."""


@contextmanager
def atomic_directory(target: Path, overwrite: bool, files_of: FilesOf = files_of_merge) -> Iterator[Path]:
    """Yield a temporary directory beside `target`. If the block succeeds, it is synced to the disk and renamed.

    Args:
        target: the directory to make. If it is a link, the directory that it points to is made.
        overwrite: whether to replace a directory that is at `target`.
        files_of: returns the files in that directory that may be deleted.

    Raises:
        MergeError: if the directory cannot be written or renamed, the disk is full, or the directory at `target` holds
            other files.
    """
    target = target.resolve()
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        with system_errors_reported(target.parent), ExitStack() as stack:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                folder = stack.enter_context(temporary_path(target))
                folder.mkdir()
            except OSError as error:
                raise MergeError(f"The output directory {target} cannot be written: {error}") from error
            yield folder
            sync_folder(folder)
            replaces = overwrite and target.is_dir() and any(target.iterdir())
            if replaces:
                check_replaceable(target, files_of)  # again, because that was long ago
            try:
                if replaces:
                    _replace(target, folder)
                else:
                    folder.rename(target)
            except OSError as error:  # a bind mount, a layer of a container's image, or no longer empty
                raise MergeError(
                    f"The output directory {target} cannot be put in its place: {error.strerror}. Choose another one."
                ) from error
            sync(target.parent)
    finally:
        if not target.exists():
            for parent in missing:
                with suppress(OSError):  # another process may have put something there
                    parent.rmdir()


@contextmanager
def complete_directory(target: Path) -> Iterator[Path]:
    """Yield what `atomic_directory` yields if `target` is missing or empty, else `target` itself, to add files to."""
    if target.is_dir() and any(target.iterdir()):
        remove_leftovers(target.absolute().parent)
        with system_errors_reported(target):
            yield target
    else:
        with atomic_directory(target, overwrite=False) as folder:
            yield folder


@contextmanager
def work_folder(parent: Path) -> Iterator[Path]:
    """Yield a new temporary folder in `parent`, which is removed afterwards.

    Raises:
        MergeError: if it cannot be made, or the disk is full.
    """
    with system_errors_reported(parent), ExitStack() as stack:
        try:
            folder = stack.enter_context(temporary_path(parent / "neuromerge"))
            folder.mkdir(0o700)
        except OSError as error:
            raise MergeError(f"No temporary folder can be made in {parent}: {error}") from error
        yield folder


@contextmanager
def system_errors_reported(folder: Path) -> Iterator[None]:
    """Report errors of the system in the block as a `MergeError`. That of a full disk names `folder`."""
    try:
        yield
    except Exception as error:
        number = _system_error(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise MergeError(
                f"No space is left on the disk of {folder}. Free some, or choose another output directory."
            ) from error
        if number == errno.EFBIG:
            raise MergeError(
                f"A file would be larger than {folder} or this process allows (`ulimit -f`). Write smaller files with "
                "max_shard_size, or choose another output directory."
            ) from error
        if number in BROKEN and not isinstance(error, MergeError):
            file = getattr(error, "filename", None) or f"a file of the merge in {folder}"
            raise MergeError(f"{file} cannot be read or written: {os.strerror(number)}. Check its disk.") from error
        raise


def _system_error(error: BaseException) -> int | None:
    cause = error.__cause__ if isinstance(error, MergeError) and error.__cause__ else error
    if isinstance(cause, OSError):
        return cause.errno
    found = OS_ERROR.search(str(cause))
    return int(found[1]) if found else None


def _replace(target: Path, folder: Path) -> None:
    """Replace the directory `target` by `folder`, in one step where the system can."""
    with suppress(OSError):  # not every file system has permissions
        shutil.copymode(target, folder)
    if _exchange(target, folder):
        return
    old = old_path(folder)
    try:
        target.rename(old)
        folder.rename(target)
    except BaseException:
        if not target.exists():
            old.rename(target)
        raise
    finally:
        if target.exists():  # else `old` is the only copy
            shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step. Return False if the system or the file system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    paths = os.fsencode(one), os.fsencode(other)
    if library.renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))
