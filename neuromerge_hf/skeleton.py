"""The model class on the meta device: the one authority on parameter names, shapes, ties, and neurons.

Names in a checkpoint file differ from those in memory (prefixes, old names, experts stored one by one). This module is
the only one that touches transformers' conversion of checkpoint names, which is half private.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.pytorch_utils import Conv1D

from neuromerge_hf.layout import Layout


@dataclass(frozen=True)
class Place:
    """What a checkpoint's tensor is in the model.

    Attributes:
        parameter: the name of the parameter in memory, the first one for tied parameters.
        piece: where the checkpoint stores the parameter in a converted form (fused experts one by one, say), the
            tensor's own name after prefixes and renamings; None where the tensor is the parameter.
        also: further parameters that are parts of the same stored tensor (fused query, key and value, say).
    """

    parameter: str
    piece: str | None = None
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class NeuronAxis:
    """Along which axis of a parameter its neurons lie; `fused` marks expert weights (E, ...), a batch of matrices."""

    axis: int
    fused: bool = False

    def layout(self, shape: tuple[int, ...]) -> Layout:
        return Layout.of_experts(shape, self.axis) if self.fused else Layout.of(shape, self.axis)


class Skeleton:
    """A model without weights.

    Args:
        model_class: the transformers class.
        config: its configuration.
    """

    def __init__(self, model_class: type[PreTrainedModel], config: PretrainedConfig):
        self.model_class = model_class
        with torch.device("meta"):
            self.model = model_class(copy.deepcopy(config))
        self.model.eval()

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter and persistent buffer, by its name in memory (tied ones under each name)."""
        return {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}

    @cached_property
    def ties(self) -> dict[str, str]:
        """Names of tied parameters, with the name of the parameter that they share."""
        owners: dict[int, str] = {}
        ties = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            owner = owners.setdefault(id(tensor), name)
            if owner != name:
                ties[name] = owner
        return ties

    @property
    def backbone_prefix(self) -> str | None:
        """The prefix of the backbone's parameters ("bert."); None if the model is itself the backbone."""
        prefix = self.model.base_model_prefix
        return f"{prefix}." if prefix and hasattr(self.model, prefix) else None

    def is_head(self, name: str) -> bool:
        """Whether a parameter of this model is outside its backbone."""
        return self.backbone_prefix is not None and not name.startswith(self.backbone_prefix)

    def is_vocabulary(self, name: str) -> bool:
        """Whether a parameter has a row for each token: the input and the output embeddings."""
        embeddings = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        return any(self.model.get_submodule(name.rpartition(".")[0]) is module for module in embeddings)

    # ------------------------------------------------------------------------------------------------------ names

    def places(self, names: Iterable[str]) -> dict[str, Place | None]:
        """What each tensor name of a checkpoint or an adapter is in this model; None for what the model lacks."""
        renamings, converters = self._conversions()
        # transformers renames in this order, and some of its renamings remember what they have seen.
        return {name: self._place(name, renamings, converters) for name in sorted(names, key=dot_natural_key)}

    def _place(self, name: str, renamings: list[WeightRenaming], converters: list[WeightConverter]) -> Place | None:
        prefix = self.model.base_model_prefix
        parameter, pattern = rename_source_key(name, renamings, converters, prefix, self.shapes)
        if parameter not in self.shapes and name in self.shapes:
            parameter, pattern = rename_source_key(name, [], [], prefix, self.shapes)
        if parameter not in self.shapes:
            return None
        parameter = self.ties.get(parameter, parameter)
        if pattern is None:
            return Place(parameter)
        piece, _ = rename_source_key(name, renamings, [])
        first, *others = next(entry for entry in converters if pattern in entry.source_patterns).target_patterns
        also = tuple(parameter.replace(first, other) for other in others)
        return Place(parameter, piece.removeprefix(f"{prefix}."), also)

    def _conversions(self) -> tuple[list[WeightRenaming], list[WeightConverter]]:
        mapping = copy.deepcopy(self._mapping)
        return (
            [entry for entry in mapping if isinstance(entry, WeightRenaming)],
            [entry for entry in mapping if isinstance(entry, WeightConverter)],
        )

    @cached_property
    def _mapping(self) -> list[WeightTransform]:
        return get_model_conversion_mapping(self.model)

    # ---------------------------------------------------------------------------------------------------- neurons

    def neuron_axis(self, parameter: str) -> NeuronAxis | None:
        """Where a parameter's neurons are, from the module that owns it; None if it is not neuronal.

        The output axis of Linear, Conv1D, convolutions and fused experts, the tokens of an Embedding. A parameter that
        belongs to a module of another class is taken as torch.nn.functional.linear takes it: rows are output units.
        """
        shape = self.shapes[parameter]
        module_name, _, attribute = parameter.rpartition(".")
        module = self.model.get_submodule(module_name)
        if isinstance(module, ParametrizationList):
            module = self.model.get_submodule(module_name.rpartition(".parametrizations.")[0])
        if len(shape) < 2:
            return None
        if isinstance(module, _ConvNd) and shape != tuple(module.weight.shape):
            return None  # the magnitudes of a weight_norm: a gate
        if isinstance(module, Conv1D | _ConvTransposeNd):
            return NeuronAxis(1)
        if isinstance(module, _ConvNd):
            return NeuronAxis(0)
        if isinstance(module, nn.Linear | nn.Embedding):
            return NeuronAxis(0)
        return self._raw_axis(module, attribute, shape)

    def _raw_axis(self, module: nn.Module, attribute: str, shape: tuple[int, ...]) -> NeuronAxis | None:
        holds_experts = any(parameter.ndim == 3 and parameter.shape[0] > 1 for parameter in module.parameters(False))
        if holds_experts and len(shape) == 3:
            return NeuronAxis(2 if getattr(module, "is_transposed", False) else 1, fused=True)
        if holds_experts:
            return None  # (E, out) beside fused experts: their biases
        axis = next((i for i, size in enumerate(shape) if size > 1), len(shape))
        # (1, 1, n), a class token, is one vector; (1, positions, n) is an embedding of positions.
        return NeuronAxis(axis) if axis < len(shape) - 1 else None

    def stored_layouts(self, stored: Mapping[str, tuple[Place, tuple[int, ...]]]) -> dict[str, Layout | None]:
        """The layout of each tensor of a checkpoint, None for those that are not neuronal.

        Args:
            stored: place and shape of each tensor, by its name in the checkpoint.
        """
        pieces: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
        for name, (place, shape) in stored.items():
            if place.piece is not None:
                pieces[place.parameter][name] = shape
        piece_axes = {parameter: self._piece_axis(parameter, group) for parameter, group in pieces.items()}
        layouts = {}
        for name, (place, shape) in stored.items():
            axis = self.neuron_axis(place.parameter) if place.piece is None else piece_axes[place.parameter]
            layouts[name] = None if axis is None else axis.layout(shape)
        return layouts

    def _piece_axis(self, parameter: str, pieces: dict[str, tuple[int, ...]]) -> NeuronAxis | None:
        """The axis of the stored pieces that becomes the parameter's neuron axis.

        Found by converting shapes alone: the stored axis whose doubling makes the parameter's neuron axis longer.
        """
        axis = self.neuron_axis(parameter)
        if axis is None:
            return None
        plain = self._converted_shape(parameter, pieces)
        ndim = min(len(shape) for shape in pieces.values())
        for stored in range(ndim):
            doubled = {
                name: (*shape[:stored], shape[stored] * 2, *shape[stored + 1 :]) for name, shape in pieces.items()
            }
            if self._converted_shape(parameter, doubled)[axis.axis] > plain[axis.axis]:
                return NeuronAxis(stored, fused=axis.fused and ndim == len(plain))
        return None

    def _converted_shape(self, parameter: str, pieces: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        renamings, converters = self._conversions()
        used: WeightConverter | None = None
        for name in sorted(pieces, key=dot_natural_key):
            _, pattern = rename_source_key(name, renamings, converters, self.model.base_model_prefix, self.shapes)
            used = used or next(entry for entry in converters if pattern in entry.source_patterns)
            collected: Any = used.collected_tensors
            collected[pattern].append(torch.empty(pieces[name], device="meta"))
        assert used is not None
        tensor = used.convert(parameter, model=self.model, config=self.model.config)[parameter]
        return tuple((tensor[0] if isinstance(tensor, list) else tensor).shape)


def model_class_of(
    config: PretrainedConfig,
    folder: Path,
    trust_remote_code: bool = False,
    default: type[PreTrainedModel] | None = None,
) -> type[PreTrainedModel]:
    """The class that a configuration's `architectures` names.

    Args:
        folder: where the model's own code is, run only with `trust_remote_code`.
        default: the class where none is named or known; the plain backbone if this is None too.
    """
    architecture = (config.architectures or [""])[0]
    remote = {reference.rpartition(".")[2]: reference for reference in getattr(config, "auto_map", {}).values()}
    if architecture in remote and trust_remote_code:
        return get_class_from_dynamic_module(remote[architecture], folder)
    named = getattr(transformers, architecture, None)
    return named or default or auto_model_class(transformers.AutoModel, config)


def auto_model_class(auto_class: type[_BaseAutoModelClass], config: PretrainedConfig) -> type[PreTrainedModel]:
    """The model class that an Auto class chooses for a configuration."""
    mapping: Any = auto_class._model_mapping
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found
