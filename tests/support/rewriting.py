"""Rewrites weight files as a training does that saves again into the same folder."""

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
