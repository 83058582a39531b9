"""Rewrites files as a training does that saves again into the same folder, or as an editor does unseen."""

import os
from pathlib import Path

from safetensors.torch import load_file, save_file

WAYS = ("in-place", "renamed")


def rewrite(path: Path, way: str, factor: float = 1.01) -> None:
    """Multiply the tensors of a safetensors file by a factor, and give it a longer header.

    Args:
        path: the file.
        way: "in-place" writes into the file, "renamed" puts another file in its place.
        factor: the factor.
    """
    new = path.with_suffix(".new")
    tensors = {name: tensor * factor for name, tensor in load_file(path).items()}
    save_file(tensors, new, metadata={"format": "pt", "comment": "b" * 1000})
    if way == "renamed":
        os.replace(new, path)
    else:
        with path.open("r+b") as file:
            file.write(new.read_bytes())
        new.unlink()


def edit_unseen(path: Path) -> None:
    """Change a byte of a file in place, and keep its size and the time of its content."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (before.st_ino, before.st_size, before.st_mtime_ns) == (after.st_ino, after.st_size, after.st_mtime_ns)
