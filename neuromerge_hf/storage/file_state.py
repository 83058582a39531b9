"""What tells whether a file is still the one that was read."""

from pathlib import Path
from typing import TypeAlias

State: TypeAlias = tuple[tuple[int, ...], ...]
"""The device, inode, size and times of a file, and of each link on the way to it."""


def state_of(file: Path) -> State | None:
    """What changes when a file is written again or replaced, or a link on its path is; None if there is no such file.

    Nobody can set the time of a file's last change (ctime) back, as copying tools do with the time of its content.
    """
    try:
        links = [path.lstat() for path in (file, *file.parents) if path.is_symlink()]
        found = [file.stat(), *links]
    except OSError:
        return None
    return tuple((each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in found)
