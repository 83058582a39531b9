"""Replacing the weights of a model temporarily, so that its trainer evaluates the merged weights."""

import hashlib
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from neuromerge_hf.callbacks.common.parking import bytes_of, parked
from neuromerge_hf.callbacks.common.processes import is_distributed, on_first_process
from neuromerge_hf.errors import MergeError
from neuromerge_hf.loading.stored_parameters import StoredParameters
from neuromerge_hf.skeleton import skeleton_of
from neuromerge_hf.storage.files import CHECKPOINT_FILES, HEAD_WEIGHTS, HEADS, find_weights
from neuromerge_hf.storage.finite import is_finite, largest_finite, name_of
from neuromerge_hf.storage.formats import open_file, open_weights
from neuromerge_hf.storage.tensors import MERGEABLE

PEFT_WRAPPERS = re.compile(r"\.(base_layer|original_module|token_adapter)(?=\.)")
"""The parts that PEFT adds to the names of adapted weights."""

HuggingFaceModel = PreTrainedModel | PeftModel


def network_of(model: HuggingFaceModel) -> PreTrainedModel:
    """The model of transformers itself. It contains PEFT's layers if the model has an adapter."""
    network: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return network


def class_of(network: PreTrainedModel) -> type[PreTrainedModel]:
    """The class of the model in transformers, not the subclass that FSDP makes of it."""
    kinds: Any = type(network).__mro__
    return next(kind for kind in kinds if not issubclass(kind, FSDPModule))


def own_weights(model: HuggingFaceModel) -> dict[str, Tensor]:
    """The live parameters and buffers of the network, by their names without an adapter."""
    return {PEFT_WRAPPERS.sub("", name): tensor for name, tensor in network_of(model).state_dict().items()}


@contextmanager
def merged_weights(model: HuggingFaceModel, folder: Path, expert: str) -> Iterator[None]:
    """Put the merged weights into `model`, in place, until the block ends. Every process must call this.

    Args:
        model: a model of the expert's class, with or without an adapter, on any device.
        folder: the folder of the merged model. Only the first process reads it.
        expert: the name of the expert whose head is used, if it has one of its own.

    Raises:
        MergeError: if the model cannot hold the merged weights.
    """
    merged: list[StoredParameters] = []
    on_first_process(lambda: merged.append(_open(folder, expert, class_of(network_of(model)))))
    with other_weights(model, merged[0] if merged else {}, folder.parent):
        yield


@contextmanager
def other_weights(model: HuggingFaceModel, weights: Mapping[str, Tensor], scratch: Path) -> Iterator[None]:
    """Put weights into `model`, and disable its adapter, until the block ends. Every process must call this.

    Parameters that are not in `weights` (a head that was not trained) keep their values.

    Args:
        model: the model, on any device.
        weights: the new weights, by their names without an adapter. Those of the first process are used.
        scratch: as in `replaced`.

    Raises:
        MergeError: if the model cannot hold the weights.
    """
    live = own_weights(model)
    on_first_process(lambda: _check_fit(live, weights))
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with replaced(live, weights, scratch), _without_adapters(model):
            yield
    finally:
        for parameter, requires_grad in trainable.items():  # PEFT changes them when it enables its layers again
            parameter.requires_grad_(requires_grad)


@contextmanager
def replaced(live: Mapping[str, Tensor], values: Mapping[str, Tensor], scratch: Path) -> Iterator[None]:
    """Put other values into the `live` tensors, in place, until the block ends. Every process must call this.

    The old values wait in a file, so that the memory of the process grows by one tensor and not by the model.

    Args:
        live: the tensors to change, by name, on any device.
        values: the new values, by the names in `live`. Those of the first process are used, one at a time.
        scratch: a folder on a disk that has room for the values of `live`, for a file without a name.

    Raises:
        MergeError: if the disk is full. Nothing has changed then.
    """
    names = on_first_process(lambda: list(values))
    changed = {(tensor.device, tensor.data_ptr(), tensor.shape): tensor for tensor in map(live.__getitem__, names)}
    with parked(list(changed.values()), scratch):
        with torch.no_grad():
            for name in names:
                if name in values:
                    live[name].copy_(values[name])
                if is_distributed():
                    dist.broadcast(live[name], 0)
        yield


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch after the block."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _open(folder: Path, expert: str, model_class: type[PreTrainedModel]) -> StoredParameters:
    """Open the merged parameters that a model of this class has, with the expert's own head if it has one."""
    main = find_weights(folder, CHECKPOINT_FILES)
    if main is None:
        raise MergeError(f"{folder} has no weights any more. Merge the models again.")
    tensors = open_weights(main)
    head = folder / HEADS / expert
    if head.is_dir():
        folder = head
        tensors |= open_file(head / HEAD_WEIGHTS)
    config: Any = model_class.config_class
    return StoredParameters(skeleton_of(model_class, config.from_pretrained(folder)), tensors)


UNFIT = "The model in training cannot hold the merged weights to evaluate them:"


def _check_fit(live: Mapping[str, Tensor], merged: Mapping[str, Tensor]) -> None:
    """Raise a `MergeError` if the live tensors cannot hold the merged ones. One of these at a time is in memory."""
    names: dict[tuple[torch.device, int], list[str]] = defaultdict(list)
    for name in merged:
        _check_value(name, live.get(name), merged[name])
        names[live[name].device, live[name].data_ptr()].append(name)
    for owner, *copies in names.values():
        for name in copies:
            if live[name].numel() and _digest(merged[name]) != _digest(merged[owner]):
                raise MergeError(f"{UNFIT} it has one tensor for {owner} and {name}, which the merge has untied.")


def _check_value(name: str, live: Tensor | None, value: Tensor) -> None:
    if live is None or live.shape != value.shape:
        raise MergeError(f"{UNFIT} it has no {name} of shape {tuple(value.shape)}.")
    # The extremes alone are cast, because rounding keeps the order.
    extremes = torch.stack(torch.aminmax(value)) if value.dtype in MERGEABLE and value.numel() else value
    if is_finite(extremes) and not is_finite(extremes.to(live.dtype)):
        raise MergeError(
            f"{UNFIT} {name} has values up to {largest_finite(value):.6g}, too large for its {name_of(live.dtype)}."
        )


def _digest(value: Tensor) -> bytes:
    return hashlib.sha256(bytes_of(value.detach().cpu())).digest()


def _without_adapters(model: HuggingFaceModel) -> AbstractContextManager[Any]:
    if isinstance(model, PeftModel):
        return model.disable_adapter()
    return _disabled_adapters(model) if getattr(model, "_hf_peft_config_loaded", False) else nullcontext()


@contextmanager
def _disabled_adapters(model: PreTrainedModel) -> Iterator[None]:
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()
