"""Rewrites weight files as a training does that saves again into the same folder."""

import os
from pathlib import Path

from safetensors.torch import load_file, save, save_file

WAYS = ("in-place", "renamed", "in-place, with its size and time")


def rewrite(path: Path, way: str, factor: float = 1.01) -> None:
    """Multiply the tensors of a safetensors file by a factor, and give it a longer header.

    Args:
        path: the file.
        way: "in-place" writes into the file, "renamed" puts another file in its place. The third way leaves the size
            of the file and the time of its last modification as they were.
        factor: the factor.
    """
    new, before = path.with_suffix(".new"), path.stat()
    tensors = {name: tensor * factor for name, tensor in load_file(path).items()}
    if way == WAYS[2]:
        with path.open("r+b") as file:
            file.write(save(tensors, metadata={"format": "pt"}))
        assert path.stat().st_size == before.st_size
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return
    save_file(tensors, new, metadata={"format": "pt", "comment": "b" * 1000})
    if way == "renamed":
        os.replace(new, path)
    else:
        with path.open("r+b") as file:
            file.write(new.read_bytes())
        new.unlink()
