"""The base model of a merge."""

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor
from transformers import PretrainedConfig

from neuromerge_hf.errors import MergeError
from neuromerge_hf.skeleton import Skeleton
from neuromerge_hf.skeleton.conversion import ParameterRef, StoredForm
from neuromerge_hf.sources.checks import check_complete, stored_form, without_tied_copies
from neuromerge_hf.storage.files import CHECKPOINT_FILES
from neuromerge_hf.storage.layout import Layout
from neuromerge_hf.storage.location import Location
from neuromerge_hf.storage.tensors import StoredTensor, read_whole


@dataclass(frozen=True)
class Base:
    """The base model, opened. No weights are read yet.

    Attributes:
        tensors: the stored tensors by their names in the checkpoint. Each tied parameter is there once.
        refs: the parameter that each tensor holds; None if the model class has no such parameter.
        layouts: how the entries of each tensor form neurons; None if it is not neuronal.
        unknown: the reasons why the neurons of some tensors cannot be found. These tensors cannot be merged.
        copies: the parameters that were untied after loading, each with the parameter that it is a copy of.
    """

    location: Location
    config: PretrainedConfig
    skeleton: Skeleton
    tensors: dict[str, StoredTensor]
    refs: dict[str, ParameterRef | None]
    layouts: dict[str, Layout | None]
    unknown: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)

    def at(self, ref: ParameterRef | None) -> tuple[StoredTensor, Layout] | None:
        """The stored tensor of a parameter and its layout (one row if it is not neuronal); None if it is not stored."""
        name = self._names.get(ref) if ref is not None else None
        if name is None:
            return None
        tensor = self.tensors[name]
        return tensor, self.layouts[name] or Layout.of(tensor.shape, None)

    def holding(self, parameters: Collection[str]) -> StoredForm:
        """The stored tensors that hold one of these parameters or a piece of one, with their parameters and shapes."""
        return {
            name: (ref, self.tensors[name].shape)
            for ref, name in self._names.items()
            if not set(parameters).isdisjoint(ref.parameters)
        }

    def has_unplaced(self, name: str) -> bool:
        """Whether the base stores a tensor of this name that its class lacks, and its config.json names no class."""
        named = self.skeleton.model_class.__name__ in (self.config.architectures or ())
        return not named and name in self.refs and self.refs[name] is None

    def unplaced_message(self, location: Location, name: str) -> str:
        """The error message for an expert's tensor that a base without a class stores as well."""
        return (
            f"{location} and the base {self.location} both hold {name}, but the base's config.json names no class "
            'that has it ("architectures"). Name the class that the base was saved as there.'
        )

    def is_tied(self, ref: ParameterRef) -> bool:
        """Whether other parameters of the model share the weights of this one."""
        return ref.parameter in self.skeleton.ties.values()

    @property
    def ties(self) -> dict[str, str]:
        """The parameters that the base's own configuration ties, each with the parameter whose weights it shares."""
        return {**self.skeleton.ties, **self.copies}

    def was_tied(self, ref: ParameterRef) -> bool:
        """Whether the base's own configuration ties this parameter to another one."""
        return ref.parameter in self.ties or ref.parameter in self.ties.values()

    def tied_refs(self, ref: ParameterRef) -> list[ParameterRef]:
        """References to the parameter whose weights this one shares, and to its untied copies."""
        owner = self.copies.get(ref.parameter, ref.parameter)
        return [ParameterRef(owner), *(ParameterRef(copy) for copy, of in self.copies.items() if of == owner)]

    def has_module(self, name: str) -> bool:
        """Whether the model has a module of this name with a weight."""
        return self.skeleton.refs([f"{name}.weight"])[f"{name}.weight"] is not None

    def missing_module_message(self, location: Location, module: str) -> str:
        """The error message for an adapter that changes a module which the base does not have."""
        return (
            f"{location} changes {module}, which the base {self.location} does not have. "
            "Check base_model: it must be the model that the adapter was trained on."
        )

    def cannot_untie_message(self, location: Location, module: str) -> str:
        """The error message for an adapter that changes a tied module which cannot be untied."""
        return (
            f"{location} changes {module} alone, which the base ties to another parameter (tie_word_embeddings), and "
            f"a {self.skeleton.model_class.__name__} cannot be untied. Exclude this module from the adapter."
        )

    def read(self, parameter: str) -> Tensor | None:
        """Read a parameter, in its form in the model, as float32 on the CPU; None if it is not stored."""
        form = self.holding([parameter])
        tensors = {name: read_whole(self.tensors[name]).float() for name in form}
        return self.skeleton.to_parameters(tensors, {name: ref for name, (ref, _) in form.items()}).get(parameter)

    def split(self, parameter: str, tensor: Tensor) -> dict[str, Tensor] | None:
        """Convert a parameter to its stored tensors, by their names; None if they also hold other parameters."""
        form = self.holding([parameter])
        if not form or any(ref.parameters != (parameter,) for ref, _ in form.values()):
            return None
        return self.skeleton.to_stored({parameter: tensor}, form)

    @cached_property
    def _names(self) -> dict[ParameterRef, str]:
        return {ref: name for name, ref in self.refs.items() if ref is not None and name in self.tensors}


def open_base(location: Location, config: PretrainedConfig, skeleton: Skeleton) -> Base:
    """Open the base's weights, from their headers alone.

    Raises:
        MergeError: if weights are missing, damaged or not those of the model class.
    """
    main = location.find_weights()
    if main is None:
        raise MergeError(f"The base {location} has no weights: it holds none of {', '.join(CHECKPOINT_FILES)}.")
    tensors = location.open_weights(main)
    refs = skeleton.refs(tensors)
    tensors = without_tied_copies(tensors, refs)
    known = stored_form(tensors, refs)
    if not known:
        raise MergeError(
            f"{main} holds no parameter of the class {skeleton.model_class.__name__}. Check its config.json."
        )
    check_complete(location, skeleton, tensors, refs, main)
    other = skeleton.other_shape(known)
    if other:
        raise MergeError(
            f"{other[0]} is {tensors[other[0]].shape} in {main}, but {other[1]} by the sizes in the config.json beside "
            "it. Save or download the model again."
        )
    return Base(location, config, skeleton, tensors, refs, *skeleton.stored_layouts(known))
