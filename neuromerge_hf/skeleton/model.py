"""Models on the meta device: the names, shapes, ties and neurons of their parameters."""

import copy
import functools
import inspect
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.parametrize import ParametrizationList
from transformers import PretrainedConfig, PreTrainedModel

from neuromerge_hf.errors import MergeError
from neuromerge_hf.skeleton.conversion import Conversions, ParameterRef, Shape, StoredForm
from neuromerge_hf.skeleton.limits import at_most
from neuromerge_hf.skeleton.neurons import NeuronAxis, neuron_axis
from neuromerge_hf.storage.layout import Layout

CACHED_SKELETONS = 16
"""How many skeletons are cached. Building one takes as long as building the model."""


@dataclass(frozen=True)
class _Architecture:
    """The key of a cached skeleton: a model class and its settings."""

    model_class: type[PreTrainedModel]
    settings: str
    config: PretrainedConfig = field(compare=False)
    most: int | None = field(compare=False)


def skeleton_of(model_class: type[PreTrainedModel], config: PretrainedConfig, most: int | None = None) -> "Skeleton":
    """The skeleton of a model class with a configuration. It is cached and must not be changed.

    Args:
        model_class: the transformers class.
        config: the configuration of the model.
        most: how many parameters and modules it may have, for a configuration that nothing was compared with yet.

    Raises:
        MergeError: if `most` is given, and the model has more or cannot be made.
    """
    return _build(_Architecture(model_class, config.to_json_string(), config, most))


@functools.lru_cache(CACHED_SKELETONS)
def _build(architecture: _Architecture) -> "Skeleton":
    model_class, config, most = architecture.model_class, architecture.config, architecture.most
    if most is None:
        return Skeleton(model_class, config)
    try:
        with at_most(most):
            return Skeleton(model_class, config, most)
    except Exception as error:  # model classes document no exceptions
        reason = (str(error).splitlines() or [type(error).__name__])[0]  # torch adds where in its code it was
        raise MergeError(f"no {model_class.__name__} can be made of it: {reason.rstrip('.')}.") from error


class Skeleton:
    """A model on the meta device, without weights.

    Args:
        model_class: the transformers class.
        config: the configuration of the model, which is copied.
        most: how many parameters and modules a model of this architecture may have.
    """

    def __init__(self, model_class: type[PreTrainedModel], config: PretrainedConfig, most: int | None = None):
        self.model_class = model_class
        self.most = most
        with torch.device("meta"):
            self.model = model_class(copy.deepcopy(config))
        self.model.eval()

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter and persistent buffer by its name in memory (tied ones under each name)."""
        return {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}

    @cached_property
    def parameters(self) -> frozenset[str]:
        """The names of all parameters in memory, tied ones under each name. Buffers are not among them."""
        return frozenset(name for name, _ in self.model.named_parameters(remove_duplicate=False))

    @cached_property
    def ties(self) -> dict[str, str]:
        """The tied parameters, each with the name of the parameter whose weights it shares."""
        owners: dict[int, str] = {}
        ties = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            owner = owners.setdefault(id(tensor), name)
            if owner != name:
                ties[name] = owner
        return ties

    @cached_property
    def pooling_layer(self) -> frozenset[str]:
        """The parameters that a model of this class lacks if it was made with ``add_pooling_layer=False``.

        This argument is not part of the configuration. The set is empty for a class that does not have it.
        """
        if "add_pooling_layer" not in inspect.signature(self.model_class).parameters:
            return frozenset()
        make: Any = self.model_class
        with torch.device("meta"):
            without = make(copy.deepcopy(self.model.config), add_pooling_layer=False)
        return frozenset(self.shapes.keys() - without.state_dict().keys())

    @property
    def backbone_prefix(self) -> str | None:
        """The prefix of the backbone's parameters ("bert."); None if the model is itself the backbone."""
        prefix = self.model.base_model_prefix
        return f"{prefix}." if prefix and hasattr(self.model, prefix) else None

    def is_head(self, name: str) -> bool:
        """Whether a parameter of this model is outside its backbone."""
        return self.backbone_prefix is not None and not name.startswith(self.backbone_prefix)

    def is_vocabulary(self, name: str) -> bool:
        """Whether a parameter belongs to the input or output embeddings, which have a row for each token."""
        return any(self.model.get_submodule(name.rpartition(".")[0]) is module for module in self._vocabulary)

    @cached_property
    def _vocabulary(self) -> list[torch.nn.Module]:
        """The modules of the input and output embeddings."""
        found = []
        for find in (self.model.get_input_embeddings, self.model.get_output_embeddings):
            with suppress(NotImplementedError):  # a class of its own that does not say where they are
                found.append(find())
        return found

    # ------------------------------------------------------------------------------------------------ checkpoints

    @cached_property
    def _conversions(self) -> Conversions:
        return Conversions(self.model, self.shapes, self.ties)

    def refs(self, names: Iterable[str]) -> dict[str, ParameterRef | None]:
        """The parameter that each tensor of a checkpoint or an adapter holds; None if the model does not have it."""
        return self._conversions.refs(names)

    def other_shape(self, stored: StoredForm) -> tuple[str, Shape] | None:
        """The first tensor whose shape is not that of the parameter that it holds whole, and the parameter's shape."""
        for name, (ref, shape) in stored.items():
            own = self.shapes.get(ref.parameter)
            if ref.piece is None and own not in (None, tuple(shape)):
                return name, own
        return None

    def mismatched_parameter(self, stored: StoredForm) -> str | None:
        """The first parameter that its stored pieces do not make up, for example if one is missing; else None."""
        for (parameter, converted), group in _grouped(stored).items():
            if not converted:
                continue
            refs = {name: ref for name, (ref, _) in group.items()}
            tensors = {name: torch.empty(shape, device="meta") for name, (_, shape) in group.items()}
            try:
                made = self.to_parameters(tensors, refs)
            except MergeError:
                return parameter
            if any(tuple(tensor.shape) != self.shapes[name] for name, tensor in made.items()):
                return parameter
        return None

    def to_parameters(self, tensors: Mapping[str, Tensor], refs: Mapping[str, ParameterRef]) -> dict[str, Tensor]:
        """Convert a checkpoint's tensors to parameters; see `Conversions.to_parameters`."""
        return self._conversions.to_parameters(tensors, refs)

    def to_stored(self, parameters: Mapping[str, Tensor], form: StoredForm) -> dict[str, Tensor]:
        """Convert parameters to the form in which a checkpoint stores them; see `Conversions.to_stored`."""
        return self._conversions.to_stored(parameters, form)

    # ---------------------------------------------------------------------------------------------------- neurons

    def neuron_axis(self, parameter: str) -> NeuronAxis | None:
        """The axis of a parameter's neurons, from the module that owns it; None if it is not neuronal.

        Raises:
            MergeError: if the axis is not known.
        """
        module_name, _, attribute = parameter.rpartition(".")
        module = self.model.get_submodule(module_name)
        if isinstance(module, ParametrizationList):
            module = self.model.get_submodule(module_name.rpartition(".parametrizations.")[0])
        axis = neuron_axis(module, attribute, self.shapes[parameter])
        if axis and axis.linear and self.is_vocabulary(parameter):
            return replace(axis, linear=False)  # a head with a row for each token is like the embeddings it may share
        return axis

    def stored_layouts(self, stored: StoredForm) -> tuple[dict[str, Layout | None], dict[str, str]]:
        """Find the layout of each tensor of a checkpoint.

        Returns:
            The layout of each tensor, None if it is not neuronal or its neurons cannot be found; and the reasons why
            the neurons of some tensors cannot be found.
        """
        layouts: dict[str, Layout | None] = {}
        unknown: dict[str, str] = {}
        for (parameter, converted), group in _grouped(stored).items():
            try:
                axis = self._piece_axis(parameter, group) if converted else self.neuron_axis(parameter)
            except MergeError as error:
                axis = None
                unknown |= dict.fromkeys(group, str(error))
            for name, (_, shape) in group.items():
                layouts[name] = axis.layout(shape) if axis else None
        return layouts, unknown

    def _piece_axis(self, parameter: str, pieces: StoredForm) -> NeuronAxis | None:
        """The axis of the stored pieces that becomes the parameter's neuron axis.

        It is found by converting shapes alone: doubling this axis of the pieces doubles the parameter's neurons.
        """
        axis = self.neuron_axis(parameter)
        if axis is None:
            return None
        ndim = min(len(shape) for _, shape in pieces.values())
        refs = {name: ref for name, (ref, _) in pieces.items()}
        group = next(iter(refs.values())).parameters
        wanted = {name: _doubled(self.shapes[name], axis.axis) for name in group}
        for stored in range(ndim):
            doubled = {name: torch.empty(_doubled(shape, stored), device="meta") for name, (_, shape) in pieces.items()}
            try:
                found = self._conversions.to_parameters(doubled, refs, wanted)
            except MergeError:  # this conversion needs fixed sizes
                continue
            if found[parameter].shape == wanted[parameter]:
                fused = axis.fused and ndim == len(self.shapes[parameter])
                return NeuronAxis(stored, fused, linear=axis.linear)
        raise MergeError(
            f"{parameter} is stored in a form in which its neurons cannot be found (as {next(iter(pieces))}). "
            "Exclude it (exclude=), so that it is the base's."
        )


def _grouped(stored: StoredForm) -> dict[tuple[str, bool], StoredForm]:
    """Stored tensors grouped by their parameter, and by whether they are pieces of it."""
    groups: dict[tuple[str, bool], dict[str, tuple[ParameterRef, Shape]]] = defaultdict(dict)
    for name, (ref, shape) in stored.items():
        groups[ref.parameter, ref.piece is not None][name] = ref, shape
    return dict(groups)


def _doubled(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], shape[axis] * 2, *shape[axis + 1 :])
