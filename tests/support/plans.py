"""The sizes of weight files and downloads, and models with .bin files."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from loopback_hub import LoopbackHub

WEIGHTS = (".safetensors", ".bin")


def size_of_weights(*folders: Path) -> int:
    """The size of all weight files of some models, in bytes."""
    return sum(path.stat().st_size for folder in folders for path in folder.iterdir() if path.suffix in WEIGHTS)


def weights_served(hub: LoopbackHub) -> dict[str, int]:
    """The number of bytes that a Hub has sent, by weight file."""
    return {name: count for name, count in hub.bytes_served.items() if name.endswith(WEIGHTS)}


def save_as_bin(models: Path, name: str, folder: Path) -> Path:
    """Copy a model, with its weights in a .bin file."""
    shutil.copytree(models / name, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder
