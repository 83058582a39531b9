"""The base model, which every expert is compared with."""

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
    """The base model.

    Attributes:
        tensors: its stored tensors by their name in the checkpoint, each tied parameter once.
        refs: what each is in the model; None for tensors that the model class does not know.
        layouts: how its entries form neurons; None for those that are not neuronal.
        unknown: for those whose neurons are not known, why. They cannot be merged.
        copies: the parameters that are opened untied, see `ties`, with the parameter that each is a copy of.
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
        """The stored tensor at a place, with its layout (one row if it is not neuronal)."""
        name = self._names.get(ref) if ref is not None else None
        if name is None:
            return None
        tensor = self.tensors[name]
        return tensor, self.layouts[name] or Layout.of(tensor.shape, None)

    def holding(self, parameters: Collection[str]) -> StoredForm:
        """The parameter and the shape of the stored tensors that hold one of these parameters, or a piece of it."""
        return {
            name: (ref, self.tensors[name].shape)
            for ref, name in self._names.items()
            if not set(parameters).isdisjoint(ref.parameters)
        }

    def is_tied(self, ref: ParameterRef) -> bool:
        """Whether several of the model's parameters share this one."""
        return ref.parameter in self.skeleton.ties.values()

    @property
    def ties(self) -> dict[str, str]:
        """Names of the parameters that its own configuration ties, with the name of the parameter that they share."""
        return {**self.skeleton.ties, **self.copies}

    def was_tied(self, ref: ParameterRef) -> bool:
        """Whether its own configuration ties a parameter."""
        return ref.parameter in self.ties or ref.parameter in self.ties.values()

    def tied_refs(self, ref: ParameterRef) -> list[ParameterRef]:
        """The place of a parameter and of what was tied to it."""
        owner = self.copies.get(ref.parameter, ref.parameter)
        return [ParameterRef(owner), *(ParameterRef(copy) for copy, of in self.copies.items() if of == owner)]

    def has_module(self, name: str) -> bool:
        """Whether the model has a module of this name with a weight."""
        return self.skeleton.refs([f"{name}.weight"])[f"{name}.weight"] is not None

    def lacks(self, location: Location, module: str) -> str:
        """The sentence that says that an adapter's module is not in the base."""
        return (
            f"{location} changes {module}, which the base {self.location} does not have. "
            "Check base_model: it must be the model that the adapter was trained on."
        )

    def cannot_untie(self, location: Location, module: str) -> str:
        """The sentence that says that a tied module cannot be changed alone."""
        return (
            f"{location} changes {module} alone, which the base ties to another parameter (tie_word_embeddings), and "
            f"a {self.skeleton.model_class.__name__} cannot be untied. Exclude this module from the adapter."
        )

    def read(self, parameter: str) -> Tensor | None:
        """A parameter as it is in the model, float32 on the CPU; None if it is not stored."""
        form = self.holding([parameter])
        tensors = {name: read_whole(self.tensors[name]).float() for name in form}
        return self.skeleton.to_parameters(tensors, {name: ref for name, (ref, _) in form.items()}).get(parameter)

    def split(self, parameter: str, tensor: Tensor) -> dict[str, Tensor] | None:
        """A parameter of the model as it is stored, by the names of its tensors; None if they hold others as well."""
        form = self.holding([parameter])
        if not form or any(ref.parameters != (parameter,) for ref, _ in form.values()):
            return None
        return self.skeleton.to_stored({parameter: tensor}, form)

    @cached_property
    def _names(self) -> dict[ParameterRef, str]:
        return {ref: name for name, ref in self.refs.items() if ref is not None and name in self.tensors}


def open_base(location: Location, config: PretrainedConfig, skeleton: Skeleton) -> Base:
    """Open the base's weights, from their headers alone."""
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
    return Base(location, config, skeleton, tensors, refs, *skeleton.stored_layouts(known))
