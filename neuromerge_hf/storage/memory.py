"""Models in memory as inputs of a merge: their tensors are read where they are."""

import copy
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from neuromerge_hf.errors import MergeError
from neuromerge_hf.live import LiveModel
from neuromerge_hf.storage.files import CONFIGS
from neuromerge_hf.storage.location import Location
from neuromerge_hf.storage.tensors import MemoryTensor, StoredTensor

WEIGHTS = "model.safetensors"
"""The name of the file that a message names, and that is not there."""

HASHED = 1 << 24
"""How many entries are copied at a time to be hashed."""


@dataclass(frozen=True)
class LiveLocation(Location):
    """A model in memory. Its folder has its configuration, and an adapter's weights, but not a full model's.

    Attributes:
        live: the model.
        tensors: a full model's parameters and buffers by name; None for an adapter, which is saved in the folder.
    """

    live: LiveModel | None = field(default=None, repr=False)
    tensors: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)
    _versions: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def name(self) -> str:
        return "in-memory"

    def find_weights(self) -> Path | None:
        return super().find_weights() if self.tensors is None else self.folder / WEIGHTS

    def open_weights(self, main: Path) -> dict[str, StoredTensor]:
        if self.tensors is None:
            return super().open_weights(main)
        return {name: MemoryTensor(name, tensor, main) for name, tensor in self.tensors.items()}

    def check_unchanged(self) -> None:
        super().check_unchanged()
        changed = [name for name, tensor in (self.tensors or {}).items() if _version(tensor) != self._versions[name]]
        if changed:
            raise MergeError(f"{changed[0]} of {self} has changed since the start of this merge. Run it again.")

    def hashes(self) -> dict[str, str]:
        """The BLAKE3 of what determines a merge: the configurations, and all weights together."""
        digest = blake3(max_threads=blake3.AUTO)
        for name, tensor in sorted((self.tensors or {}).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            for part in tensor.detach().reshape(-1).split(HASHED):
                digest.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
        weights = digest.hexdigest()
        files = sorted(path for path in self.folder.iterdir() if path.name in CONFIGS or path.suffix == ".safetensors")
        found = {path.name: blake3(path.read_bytes()).hexdigest() for path in files}
        return found if self.tensors is None else {**found, WEIGHTS: weights}


def locate_live(live: LiveModel) -> LiveLocation:
    """Locate a model in memory. Its configuration or adapter is saved in a temporary folder, which goes with it.

    Raises:
        MergeError: if its weights are not all in memory, or several adapters are active.
    """
    model = live.model
    folder = Path(tempfile.mkdtemp(prefix="neuromerge-live-"))
    try:
        tensors = _save(live, model, folder)
        location = LiveLocation(str(live), folder, live=live, tensors=tensors)
    except BaseException:
        shutil.rmtree(folder)
        raise
    weakref.finalize(live, shutil.rmtree, folder, ignore_errors=True)  # copies of the location share it
    location.watch_folder()
    location._versions.update({name: _version(tensor) for name, tensor in (tensors or {}).items()})
    return location


def _save(live: LiveModel, model: Any, folder: Path) -> dict[str, Tensor] | None:
    """Save an adapter, or the configuration of a full model. Returns the full model's weights."""
    adapters = _adapters(model)
    if adapters is None:
        config = copy.deepcopy(model.config)
        config.architectures = [_class_of(model).__name__]
        config.save_pretrained(folder)
        if model._auto_class:  # the class is custom code
            from transformers.dynamic_module_utils import custom_object_save

            custom_object_save(model, str(folder), config=config)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
        return _weights_of(live, model)
    if len(adapters) != 1:
        raise MergeError(f"{live} has the active adapters {adapters}. Activate one of them: only one can be an expert.")
    if not hasattr(model, "get_base_model"):  # transformers' own integration saves the active adapter alone
        model.save_pretrained(folder)
        return None
    model.save_pretrained(str(folder), selected_adapters=adapters)
    inner = folder / adapters[0]
    if inner.is_dir():
        for path in inner.iterdir():
            path.rename(folder / path.name)
        inner.rmdir()
    network = model.get_base_model()
    if not getattr(network, "hf_quantizer", None):  # the configuration names the head's labels
        config = copy.deepcopy(network.config)
        config.architectures = [_class_of(network).__name__]
        config.save_pretrained(folder)
    return None


def _adapters(model: Any) -> list[str] | None:
    """The names of the active adapters; None for a full model."""
    if hasattr(model, "get_base_model"):
        return list(model.active_adapters)
    if getattr(model, "_hf_peft_config_loaded", False):
        found: list[str] = model.active_adapters()
        return found
    return None


def _class_of(model: Any) -> type:
    """The class of a model in transformers, not one that a loader derived from it."""
    kinds = type(model).__mro__
    return next(kind for kind in kinds if not kind.__module__.startswith(("neuromerge_hf.", "torch.distributed")))


def _weights_of(live: LiveModel, model: Any) -> dict[str, Tensor]:
    """The parameters and buffers of a model by name, without the copies of tied ones."""
    found: dict[str, Tensor] = {}
    owners: set[tuple[object, ...]] = set()
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise MergeError(f"{name} of {live} is not in memory but offloaded. Save the model, and give the folder.")
        if type(tensor.data) is not Tensor:
            kind = type(tensor.data).__name__
            raise MergeError(f"{name} of {live} is a {kind}, and no plain tensor. Save the model, and give the folder.")
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() == 0 or place not in owners:
            owners.add(place)
            found[name] = tensor.detach()
    return found


def _version(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
