"""Adapters whose effective weights PEFT computes: one module at a time, or the whole model if layers share state.

The weights are computed right before the merge, in float32 on the CPU, into a temporary file. Their task vectors are
differences from the base, as for a full checkpoint.
"""

import copy
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from neuromerge_hf.errors import MergeError
from neuromerge_hf.skeleton import ParameterRef
from neuromerge_hf.sources.base import Base
from neuromerge_hf.sources.computed import ComputedTensors
from neuromerge_hf.sources.heads import task_class
from neuromerge_hf.sources.peft.tuner import AnyConfig, TunedModule, needs_whole_model, target_parameters, type_of
from neuromerge_hf.sources.task_vector import Difference, TaskVector
from neuromerge_hf.storage.location import Location
from neuromerge_hf.storage.tensors import StoredTensor, read_whole

MODULE_SELECTORS = (
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
)
"""Options of adapter configurations that select modules or parameters."""


def open_computed(
    location: Location,
    file: Path,
    config: AnyConfig,
    changes: Sequence[TunedModule],
    base: Base,
    stored: Mapping[ParameterRef, StoredTensor],
    head_config: PretrainedConfig | None,
) -> tuple[ComputedTensors, dict[ParameterRef, TaskVector]]:
    """Open the task vectors of an adapter whose effective weights PEFT computes.

    Args:
        file: the adapter's weight file, for messages.
        changes: the modules that the adapter changes.
        stored: the parameters that the adapter stores whole, which replace the base's.
        head_config: the configuration of the adapter's task model; None if the adapter has no head of its own.

    Returns:
        The effective weights to compute before the merge, and the task vectors that read them.

    Raises:
        MergeError: if the base stores a changed parameter in one tensor with others.
    """
    forms, refs = {}, {}
    for change in changes:
        for parameter in change.parameters:
            name = change.full_name(parameter, base)
            pieces = base.split(name, base.skeleton.model.get_parameter(name))
            if pieces is None:
                raise MergeError(
                    f"{location} changes {name} alone, which the base {base.location} stores in one tensor with "
                    "others. Put it into its base with PEFT's merge_and_unload(), save that model, and give it in "
                    "place of the adapter."
                )
            for key, piece in pieces.items():
                ref = base.refs[key]
                assert ref is not None
                forms[key] = torch.float32, tuple(piece.shape)
                refs[key] = base.tied_refs(ref) if change.changes_tied else [ref]

    def compute() -> Iterator[tuple[str, Tensor]]:
        with _reproducible():
            if needs_whole_model(config):
                merged = _merged_model(location, file, config, changes, base, head_config)
            else:
                merged = _merged_modules(file, config, changes, base, stored)
            for name, tensor in merged:
                for key, piece in (base.split(name, tensor) or {}).items():
                    yield key, piece.float()

    computed = ComputedTensors(forms, compute, file)
    vectors: dict[ParameterRef, TaskVector] = {}
    for key, tensor in computed.tensors.items():
        for ref in refs[key]:
            found = base.at(ref)
            assert found is not None
            vectors[ref] = Difference(tensor, found[1])
    return computed, vectors


@contextmanager
def _reproducible() -> Iterator[None]:
    """Fix the random numbers that PEFT draws, and ignore its warnings, except that missing keys are an error."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", ".*missing adapter keys")
        torch.manual_seed(0)
        yield


def _merged_modules(
    file: Path,
    config: AnyConfig,
    changes: Sequence[TunedModule],
    base: Base,
    stored: Mapping[ParameterRef, StoredTensor],
) -> Iterator[tuple[str, Tensor]]:
    """Yield the effective parameters by their names in the base's class, one module at a time."""
    for change in changes:
        layer = copy.deepcopy(base.skeleton.model.get_submodule(change.base_name)).to_empty(device="cpu").float()
        for name, parameter in layer.named_parameters():
            ref = ParameterRef(change.full_name(name, base))
            value = read_whole(stored[ref]).float() if ref in stored else base.read(ref.parameter)
            if value is None:
                raise MergeError(f"{base.location} lacks {ref.parameter}, which {file} builds on. Check base_model.")
            parameter.data.copy_(value)
        others = [(name, value) for name, value in layer.named_parameters() if name not in change.parameters]
        before = {name: value.detach().clone() for name, value in others}
        try:
            after = _with_new_tokens(layer, config, change) if change.tokens else _merged_layer(layer, config, change)
        except Exception as error:  # PEFT documents no exception types
            raise MergeError(
                f"PEFT cannot merge {change.module} of {file}: {error}. If that is no sign of a damaged adapter or of "
                "another base (check base_model), leave the adapter out."
            ) from error
        for name, tensor in after.items():
            if name in change.parameters:
                yield change.full_name(name, base), tensor
            elif not torch.equal(tensor, before[name]):
                raise MergeError(
                    f"{file} changes {name} of {change.module}, which is not known of an adapter of type "
                    f"{type_of(config)}. Put it into its base with PEFT's merge_and_unload(), save that model, and "
                    "give it in place of the adapter."
                )


def _with_new_tokens(layer: nn.Module, config: AnyConfig, change: TunedModule) -> dict[str, Tensor]:
    """The parameters of an embedding with the rows of trained tokens replaced."""
    indices = config.token_indices if hasattr(config, "token_indices") else config.trainable_token_indices
    if isinstance(indices, dict):
        indices = next(rows for module, rows in indices.items() if f".{change.module}".endswith(f".{module}"))
    assert change.tokens is not None
    parameters = {name: parameter.data for name, parameter in layer.named_parameters()}
    rows = read_whole(change.tokens).float()
    return parameters | {"weight": parameters["weight"].index_copy(0, torch.tensor(indices), rows)}


def _merged_layer(layer: nn.Module, config: AnyConfig, change: TunedModule) -> dict[str, Tensor]:
    """The parameters of a layer after PEFT has merged an adapter into it."""
    tree = _single_layer_model(change.module, layer)
    inject_adapter_in_model(_single_module_config(config, change.module, layer), tree)
    tensors = {name: read_whole(tensor) for name, tensor in change.tensors.items()}
    loaded: Any = set_peft_model_state_dict(tree, tensors)
    missing = [key for key in loaded.missing_keys if PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type] in key]
    if missing or loaded.unexpected_keys:
        raise ValueError(f"{', '.join([*missing, *loaded.unexpected_keys])} is missing or unknown")
    tuned: Any = tree.get_submodule(change.module)
    if hasattr(tuned, "unload_and_optionally_merge_module"):
        merged = tuned.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
    else:
        tuned.merge(safe_merge=True)
        merged = tuned.get_base_layer()
    return {name: parameter.data for name, parameter in merged.named_parameters()}


def _single_layer_model(name: str, layer: nn.Module) -> nn.Module:
    """A model of one layer under its full name, which patterns in an adapter's configuration refer to."""
    root = parent = nn.Module()
    *path, last = name.split(".")
    for part in path:
        child = nn.Module()
        parent.add_module(part, child)
        parent = child
    parent.add_module(last, layer)
    return root


def _single_module_config(config: AnyConfig, module: str, layer: nn.Module) -> AnyConfig:
    """A copy of an adapter's configuration that selects one module alone."""
    parameters = target_parameters(config, module, layer)
    config = copy.deepcopy(config)
    for option in MODULE_SELECTORS:
        if hasattr(config, option):
            setattr(config, option, None)
    config.target_modules = [] if parameters else [module]
    if parameters:
        config.target_parameters = [f"{module}.{parameter}" for parameter in parameters]
    config.inference_mode = True
    return config


def _merged_model(
    location: Location,
    file: Path,
    config: AnyConfig,
    changes: Sequence[TunedModule],
    base: Base,
    head_config: PretrainedConfig | None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the effective parameters of the whole model merged on the CPU, by their names in the base's class."""
    model_class: type[PreTrainedModel] = task_class(config.task_type, base.config) or base.skeleton.model_class
    model_config = copy.deepcopy(head_config or base.config)
    if base.copies:
        model_config.tie_word_embeddings = True  # the files of the base hold it tied
    # The files are read and not mapped into memory: a process ends by a signal if a file that it maps becomes shorter.
    stored = {name: read_whole(tensor) for name, tensor in base.tensors.items()}
    model = model_class.from_pretrained(None, config=model_config, state_dict=stored, dtype=torch.float32)
    try:
        with TemporaryDirectory() as copy_of_adapter:
            for path in (file, file.with_name("adapter_config.json")):
                shutil.copyfile(path, Path(copy_of_adapter, path.name))
            merged = PeftModel.from_pretrained(model, copy_of_adapter).merge_and_unload(safe_merge=True)
    except Exception as error:  # PEFT documents no exception types
        raise MergeError(
            f"PEFT cannot merge {location}: {error}. If that is no sign of a damaged adapter or of another base (check "
            "base_model), leave the adapter out."
        ) from error
    state = merged.state_dict()
    found = {ref.parameter: state[name] for name, ref in base.skeleton.refs(state).items() if ref}
    for change in changes:
        for parameter in change.parameters:
            name = change.full_name(parameter, base)
            yield name, found[name]
