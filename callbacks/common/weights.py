"""Other weights in a model for a while: the merged ones, to be evaluated by the trainer whose model it is."""

import random
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from neuromerge_hf.callbacks.common.processes import is_distributed, on_first_process
from neuromerge_hf.errors import MergeError
from neuromerge_hf.loading.auto import AutoMergedModel
from neuromerge_hf.storage.files import HEADS

PEFT_WRAPPERS = re.compile(r"\.(base_layer|original_module|token_adapter)(?=\.)")
"""What PEFT puts into the names of the weights that it adapts."""

HuggingFaceModel = PreTrainedModel | PeftModel


def network_of(model: HuggingFaceModel) -> PreTrainedModel:
    """The transformers model, inside of which PEFT has put its layers if it is adapted."""
    network: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return network


def class_of(network: PreTrainedModel) -> type[PreTrainedModel]:
    """Its class of transformers, of which FSDP makes one of its own."""
    kinds: Any = type(network).__mro__
    return next(kind for kind in kinds if not issubclass(kind, FSDPModule))


def own_weights(model: HuggingFaceModel) -> dict[str, Tensor]:
    """The live parameters and buffers of the network, by the names that they have without an adapter."""
    return {PEFT_WRAPPERS.sub("", name): tensor for name, tensor in network_of(model).state_dict().items()}


@contextmanager
def merged_weights(model: HuggingFaceModel, folder: Path, expert: str) -> Iterator[None]:
    """`model` computes what the merged model does, in place, as long as the block lasts. On every process.

    Args:
        model: of the class of `expert`, adapted or not, on any device.
        folder: the merged model; read on the first process alone.
        expert: whose head is put on, if it has one of its own.

    Raises:
        MergeError: if the model cannot hold the merged weights.
    """
    merged: dict[str, Tensor] = {}
    on_first_process(lambda: merged.update(_load(folder, expert, class_of(network_of(model)))))
    with other_weights(model, merged):
        yield


@contextmanager
def other_weights(model: HuggingFaceModel, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """`model` has these weights, and no adapter, as long as the block lasts. On every process.

    Parameters that are not among them (a head that was not trained) stay as they are.

    Args:
        weights: by the names that they have without an adapter; those of the first process count.

    Raises:
        MergeError: if the model cannot hold them.
    """
    live = own_weights(model)
    on_first_process(lambda: _check_fit(live, weights))
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with replaced(live, weights), _without_adapters(model):
            yield
    finally:
        for parameter, requires_grad in trainable.items():  # PEFT sets them when it switches its layers on again
            parameter.requires_grad_(requires_grad)


@contextmanager
def replaced(live: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """`live` tensors hold other values, in place, as long as the block lasts. On every process.

    Args:
        values: by the names in `live`; those of the first process count.
    """
    saved = {name: tensor.detach().to("cpu", copy=True) for name, tensor in live.items()}
    with torch.no_grad():
        for name, value in values.items():
            live[name].copy_(value)
        if is_distributed():
            for name in sorted(live):
                dist.broadcast(live[name], 0)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in saved.items():
                live[name].copy_(value)


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Random numbers go on after the block as if it had not been."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _load(folder: Path, expert: str, model_class: type[PreTrainedModel]) -> dict[str, Tensor]:
    """The merged parameters, as far as a model of this class has them all."""
    head = expert if (folder / HEADS / expert).is_dir() else None
    with TemporaryDirectory() as cache:
        loaded: Any = AutoMergedModel.from_pretrained(
            folder,
            head=head,
            auto_class=model_class,
            cache_dir=cache,
            output_loading_info=True,
            trust_remote_code=bool(model_class._auto_class),  # its own code runs here already
        )
    missing = set(loaded[1]["missing_keys"])
    return {name: tensor for name, tensor in loaded[0].state_dict().items() if name not in missing}


def _check_fit(live: Mapping[str, Tensor], merged: Mapping[str, Tensor]) -> None:
    first: dict[int, str] = {}
    for name, value in merged.items():
        if name not in live or live[name].shape != value.shape:
            raise MergeError(
                f"The model in training cannot hold the merged weights to evaluate them: it has no {name} of shape "
                f"{tuple(value.shape)}."
            )
        owner = first.setdefault(live[name].data_ptr(), name)
        if not torch.equal(value, merged[owner]):
            raise MergeError(
                f"The model in training cannot hold the merged weights to evaluate them: it has one tensor for {owner} "
                f"and {name}, which the merge has untied."
            )


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
