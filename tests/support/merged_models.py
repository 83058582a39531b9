"""Loading merged models with plain transformers, and reading their stored tensors."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from families import Relatives


def load_merged(relatives: Relatives, merged: Path, expert: Path, number: int) -> torch.nn.Module:
    """Load a merged model as an expert's class, with the expert's own head if the base has none."""
    model = relatives.untrained(number, merged)
    head = merged / "heads" / expert.name / "head.safetensors"
    if head.exists():
        assert not model.load_state_dict(load_file(head), strict=False).unexpected_keys
    return model.eval()


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's safetensors files, by their stored names."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors
