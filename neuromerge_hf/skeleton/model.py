"""The model class on the meta device."""

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.utils.parametrize import ParametrizationList
from transformers import PretrainedConfig, PreTrainedModel

from neuromerge_hf.errors import MergeError
from neuromerge_hf.skeleton.conversion import Conversions, ParameterRef, Shape, StoredForm
from neuromerge_hf.skeleton.neurons import NeuronAxis, neuron_axis
from neuromerge_hf.storage.layout import Layout


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

    # ------------------------------------------------------------------------------------------------ checkpoints

    @cached_property
    def _conversions(self) -> Conversions:
        return Conversions(self.model, self.shapes, self.ties)

    def refs(self, names: Iterable[str]) -> dict[str, ParameterRef | None]:
        """What each tensor name of a checkpoint or an adapter is in this model; None for what the model lacks."""
        return self._conversions.refs(names)

    def misfit(self, stored: StoredForm) -> str | None:
        """The first parameter that the stored pieces of a checkpoint do not make up: some are missing, say."""
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
        """The parameters that a checkpoint's tensors make; see `Conversions.to_parameters`."""
        return self._conversions.to_parameters(tensors, refs)

    def to_stored(self, parameters: Mapping[str, Tensor], form: StoredForm) -> dict[str, Tensor]:
        """Parameters in the form in which a checkpoint stores them; see `Conversions.to_stored`."""
        return self._conversions.to_stored(parameters, form)

    # ---------------------------------------------------------------------------------------------------- neurons

    def neuron_axis(self, parameter: str) -> NeuronAxis | None:
        """Where a parameter's neurons are, from the module that owns it; None if it is not neuronal.

        Raises:
            MergeError: if it is not known.
        """
        module_name, _, attribute = parameter.rpartition(".")
        module = self.model.get_submodule(module_name)
        if isinstance(module, ParametrizationList):
            module = self.model.get_submodule(module_name.rpartition(".parametrizations.")[0])
        return neuron_axis(module, attribute, self.shapes[parameter])

    def stored_layouts(self, stored: StoredForm) -> tuple[dict[str, Layout | None], dict[str, str]]:
        """The layout of each tensor of a checkpoint, None for those that are not neuronal.

        Returns:
            The layouts by name, and for those whose neurons cannot be found, why. These have none either.
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

        Found by converting shapes alone: the stored axis whose doubling makes a parameter with twice the neurons.
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
            except MergeError:  # an operation that does not stretch
                continue
            if found[parameter].shape == wanted[parameter]:
                return NeuronAxis(stored, fused=axis.fused and ndim == len(self.shapes[parameter]))
        raise MergeError(
            f"{parameter} is stored in a form in which its neurons cannot be found (as {next(iter(pieces))}). "
            "Exclude it (exclude=), so that it is the base's."
        )


def _grouped(stored: StoredForm) -> dict[tuple[str, bool], StoredForm]:
    """Stored tensors by their parameter, and whether they are pieces of it."""
    groups: dict[tuple[str, bool], dict[str, tuple[ParameterRef, Shape]]] = defaultdict(dict)
    for name, (ref, shape) in stored.items():
        groups[ref.parameter, ref.piece is not None][name] = ref, shape
    return dict(groups)


def _doubled(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], shape[axis] * 2, *shape[axis + 1 :])
