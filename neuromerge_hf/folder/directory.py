"""Writing a directory atomically: it appears at its path only when it is complete."""

import errno
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from neuromerge_hf.errors import MergeError


@contextmanager
def atomic_directory(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary directory beside `target`. It is renamed to `target` if the block succeeds, else removed.

    Args:
        overwrite: whether to replace a directory that is at `target`.

    Raises:
        MergeError: if the directory cannot be written or renamed, or the disk is full.
    """
    missing = [parent for parent in target.parents if not parent.exists()]
    folder = _beside(target)
    try:
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise MergeError(f"The output directory {target} cannot be written: {error}") from error
        yield folder
        try:
            if overwrite and target.is_dir():
                _replace(target, folder)
            else:
                folder.rename(target)
        except OSError as error:  # a bind mount, a layer of a container's image, or no longer empty
            raise MergeError(
                f"The output directory {target} cannot be put in its place: {error.strerror}. Choose another one."
            ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MergeError(
                f"No space is left on the disk of {target.parent}. Free some, or choose another output directory."
            ) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not target.exists():
            for parent in missing:
                with suppress(OSError):  # another process may have put something there
                    parent.rmdir()


def _replace(target: Path, folder: Path) -> None:
    """Replace the directory `target` by `folder`."""
    old = _beside(target)
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


def _beside(target: Path) -> Path:
    """An unused hidden path beside `target`. It is known before the directory exists, so cleanup cannot miss it."""
    return target.with_name(f".{target.name}-{secrets.token_hex(4)}")
