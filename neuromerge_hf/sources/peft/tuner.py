"""The modules and parameters that an adapter changes, from its configuration and the names of its tensors."""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from neuromerge_hf.skeleton import ParameterRef
from neuromerge_hf.sources.aligned import AlignedTensor
from neuromerge_hf.sources.base import Base
from neuromerge_hf.storage.location import Location
from neuromerge_hf.storage.tensors import StoredTensor

SHARED_STATE_TYPES = ("FROD", "PVERA", "RANDLORA", "TINYLORA", "UNILORA", "VBLORA", "VERA")
"""Types whose layers share state, so that no module can be computed alone. Newer types declare it themselves."""

AnyConfig: TypeAlias = Any
"""A `PeftConfig`. Each type of adapter has options of its own."""


@dataclass(frozen=True)
class TunedModule:
    """A module that an adapter changes.

    Attributes:
        module: the name of the module in the adapter.
        base_name: the name of the module in the base's class.
        parameters: the names in the module of the parameters that change.
        tensors: the tuner's tensors for the module, by their names in the adapter.
        tokens: the new rows of an embedding of which only some tokens were trained.
        changes_tied: whether the parameters that are tied to the module change with it.
    """

    module: str
    base_name: str
    parameters: tuple[str, ...]
    tensors: Mapping[str, StoredTensor]
    tokens: StoredTensor | None = None
    changes_tied: bool = False

    def full_name(self, parameter: str, base: Base) -> str:
        """The name in the base's class of one of the module's parameters; the first of its names if it is tied."""
        name = f"{self.base_name}.{parameter}"
        return base.skeleton.ties.get(name, name)


def type_of(config: AnyConfig) -> str:
    """The name of an adapter's type in its configuration."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def needs_whole_model(config: AnyConfig) -> bool:
    """Whether PEFT must merge an adapter in the whole model, because its layers share state or are loaded together."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    resized = type_of(config) == "ADALORA" and bool(config.rank_pattern)
    return resized or type_of(config) in SHARED_STATE_TYPES or getattr(tuner, "uses_shared_state", False)


def is_targeted(config: AnyConfig, module: str, base: Base) -> bool:
    """Whether PEFT puts a tuner on a module with this name in the adapter, so that it loads the module's tensors."""
    targets = getattr(config, "target_modules", None)
    if targets is None:
        defaults = getattr(PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type], "target_module_mapping", None) or {}
        targets = defaults.get(base.config.model_type)
    selects_otherwise = getattr(config, "target_parameters", None) or getattr(config, "ensure_weight_tying", False)
    if targets is None or targets == "all-linear" or selects_otherwise:
        return True
    config = copy.copy(config)
    config.target_modules = targets
    weight = base.skeleton.refs([f"{module}.weight"])[f"{module}.weight"]
    names = {module, weight.parameter.removesuffix(".weight") if weight else module}
    return any(check_target_module_exists(config, name) for name in names)


def shared_state_targets(config: AnyConfig, base: Base) -> dict[str, dict[str, StoredTensor]]:
    """The modules that an adapter changes if it stores only the state that its layers share; empty for other types."""
    if not needs_whole_model(config):
        return {}
    modules = (name for name, _ in base.skeleton.model.named_modules() if name)
    return {name: {} for name in modules if check_target_module_exists(config, name)}


def find_changes(
    location: Location,
    config: AnyConfig,
    tuned: Mapping[str, Mapping[str, StoredTensor]],
    tokens: Mapping[str, StoredTensor],
    base: Base,
) -> tuple[list[TunedModule], list[str]]:
    """Find the modules that an adapter changes.

    Args:
        tuned: the tuner's tensors of each module.
        tokens: the new rows of each embedding of which only some tokens were trained.

    Returns:
        The modules, and the problems that were found.
    """
    changes, problems = [], []
    if needs_whole_model(config) and any(isinstance(tensor, AlignedTensor) for tensor in base.tensors.values()):
        problems.append(
            f"{location} is of type {type_of(config)}, which PEFT computes in the whole model at once, and has another "
            f"number of tokens than the base {base.location}. Put it into its resized base with PEFT's "
            "merge_and_unload(), save that model with its tokenizer, and give it in place of the adapter."
        )
    for module, tensors in [*tuned.items(), *((module, {}) for module in tokens)]:
        base_name = _base_name(module, config, base)
        if base_name is None:
            problems.append(base.missing_module_message(location, module))
            continue
        rows = tokens.get(module)
        parameters = (
            ("weight",) if rows else _changed_parameters(config, module, base.skeleton.model.get_submodule(base_name))
        )
        changes_tied = rows is not None and len(tokens) == 1 and f"{base_name}.weight" not in base.ties
        changes.append(TunedModule(module, base_name, parameters, tensors, rows, changes_tied))
        for parameter in parameters:
            ref = ParameterRef(f"{base_name}.{parameter}")
            if ref.parameter not in base.skeleton.shapes:
                problems.append(
                    f"{location} adds {ref.parameter}, which the base {base.location} does not have. "
                    "Merge it into a model with this parameter, with zeros in it, or leave it out."
                )
            elif not changes_tied and (base.was_tied(ref) if needs_whole_model(config) else base.is_tied(ref)):
                problems.append(base.cannot_untie_message(location, module))
    return changes, problems


def _base_name(module: str, config: AnyConfig, base: Base) -> str | None:
    """The name of an adapter's module in the base's class; None if the base does not have it."""
    parameters = [target.rpartition(".")[2] for target in getattr(config, "target_parameters", None) or ()]
    names = [f"{module}.{parameter}" for parameter in ("weight", *parameters)]
    for name, ref in base.skeleton.refs(names).items():
        if ref and ref.piece is None:
            parameter = name.rpartition(".")[2]
            tied = [alias for alias, owner in base.skeleton.ties.items() if owner == ref.parameter]
            found = next((alias for alias in tied if alias.endswith(name)), ref.parameter)
            return found.removesuffix(f".{parameter}")
    return None


def _changed_parameters(config: AnyConfig, module: str, layer: nn.Module) -> tuple[str, ...]:
    """The names in a module of the parameters that a tuner changes. `effective` checks that no others change."""
    targets = target_parameters(config, module, layer)
    if targets:
        return targets
    kind = type_of(config)
    has_bias = getattr(layer, "bias", None) is not None
    if kind == "BEFT":
        return ("bias",)
    if kind == "LN_TUNING":
        return tuple(name for name, _ in layer.named_parameters())
    if isinstance(config, LoraConfig) and config.lora_bias:
        return ("weight", "bias")
    if kind == "IA3":
        has_bias &= not _is_feedforward(config, module)
    elif kind == "GLORA":
        has_bias &= config.config_C != "none" or config.config_D_E != "none"
    elif kind not in ("ADAMSS", "ROAD"):
        has_bias = False
    return ("weight", "bias") if has_bias else ("weight",)


def _is_feedforward(config: AnyConfig, module: str) -> bool:
    """Whether IA3 scales the inputs of a module rather than its outputs."""
    patterns = config.feedforward_modules or ()
    if isinstance(patterns, str):
        return re.fullmatch(patterns, module) is not None
    return any(module == pattern or module.endswith(f".{pattern}") for pattern in patterns)


def target_parameters(config: AnyConfig, module: str, layer: nn.Module) -> tuple[str, ...]:
    """The names in a module of the parameters that LoRA's option target_parameters selects."""
    targets = getattr(config, "target_parameters", None) or ()
    return tuple(
        name
        for name, _ in layer.named_parameters(recurse=False)
        if any(f".{module}.{name}".endswith(f".{target}") for target in targets)
    )
