"""Merges experts with the library. The result is what a method adds to the base."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from experts import BASE
from methods import METHODS, Setting
from safetensors.torch import load_file
from scoring import Encoder, load_base

from neuromerge_hf import merge


def merged_direction(folders: Sequence[Path], setting: Setting) -> Encoder:
    """Return what a method adds to the base at scale 1, without the parameters that it leaves unchanged."""
    config = METHODS[setting.method].config(setting.density or 1)
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary, "merged")
        merge(list(folders), output, base_model=BASE, config=config, threads=1)
        merged = load_file(output / "model.safetensors")
    changes = {name: merged[name].float() - weight for name, weight in load_base().items()}
    return {name: change for name, change in changes.items() if change.any()}


def add(base: Encoder, direction: Encoder, scale: float) -> Encoder:
    """Return the base plus `scale` times a direction. Parameters that the direction lacks are unchanged."""
    return {name: weight + scale * direction[name] if name in direction else weight for name, weight in base.items()}
