"""What every kind of expert is opened to, and the base that it is compared with."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from neuromerge_hf.errors import MergeError
from neuromerge_hf.skeleton import Place, Skeleton, StoredForm
from neuromerge_hf.sources.computed import Preparation
from neuromerge_hf.sources.heads import Head
from neuromerge_hf.sources.task_vector import TaskVector
from neuromerge_hf.storage.layout import Block, Layout
from neuromerge_hf.storage.location import Location
from neuromerge_hf.storage.tensors import MERGEABLE, StoredTensor, is_remote, read_rows, read_whole

COMPARED_AT_ONCE = 1 << 20

VOCABULARY_REMEDY = (
    "Put the tokenizer files of the base and of the expert into their folders, by which rows are aligned. Or resize "
    "the expert's embeddings to the base's vocabulary (model.resize_token_embeddings) and save it again."
)


@dataclass(frozen=True)
class Base:
    """The base model.

    Attributes:
        tensors: its stored tensors by their name in the checkpoint, each tied parameter once.
        places: what each is in the model; None for tensors that the model class does not know.
        layouts: how its entries form neurons; None for those that are not neuronal.
        unknown: for those whose neurons are not known, why. They cannot be merged.
        copies: the parameters that are opened untied, see `ties`, with the parameter that each is a copy of.
    """

    location: Location
    config: PretrainedConfig
    skeleton: Skeleton
    tensors: dict[str, StoredTensor]
    places: dict[str, Place | None]
    layouts: dict[str, Layout | None]
    unknown: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)

    def at(self, place: Place | None) -> tuple[StoredTensor, Layout] | None:
        """The stored tensor at a place, with its layout (one row if it is not neuronal)."""
        name = self._names.get(place) if place is not None else None
        if name is None:
            return None
        tensor = self.tensors[name]
        return tensor, self.layouts[name] or Layout.of(tensor.shape, None)

    def holding(self, parameters: Collection[str]) -> StoredForm:
        """Place and shape of the stored tensors that hold one of these parameters, or a piece of it."""
        return {
            name: (place, self.tensors[name].shape)
            for place, name in self._names.items()
            if not set(parameters).isdisjoint(place.parameters)
        }

    def is_tied(self, place: Place) -> bool:
        """Whether several of the model's parameters share this one."""
        return place.parameter in self.skeleton.ties.values()

    @property
    def ties(self) -> dict[str, str]:
        """Names of the parameters that its own configuration ties, with the name of the parameter that they share."""
        return {**self.skeleton.ties, **self.copies}

    def was_tied(self, place: Place) -> bool:
        """Whether its own configuration ties a parameter."""
        return place.parameter in self.ties or place.parameter in self.ties.values()

    def tied_places(self, place: Place) -> list[Place]:
        """The place of a parameter and of what was tied to it."""
        owner = self.copies.get(place.parameter, place.parameter)
        return [Place(owner), *(Place(copy) for copy, of in self.copies.items() if of == owner)]

    def has_module(self, name: str) -> bool:
        """Whether the model has a module of this name with a weight."""
        return self.skeleton.places([f"{name}.weight"])[f"{name}.weight"] is not None

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
        return self.skeleton.to_parameters(tensors, {name: place for name, (place, _) in form.items()}).get(parameter)

    def split(self, parameter: str, tensor: Tensor) -> dict[str, Tensor] | None:
        """A parameter of the model as it is stored, by the names of its tensors; None if they hold others as well."""
        form = self.holding([parameter])
        if not form or any(place.parameters != (parameter,) for place, _ in form.values()):
            return None
        return self.skeleton.to_stored({parameter: tensor}, form)

    @cached_property
    def _names(self) -> dict[Place, str]:
        return {place: name for name, place in self.places.items() if place is not None and name in self.tensors}


@dataclass(frozen=True)
class Expert:
    """An expert, opened: nothing of its weights is read yet.

    Attributes:
        name: the last part of its id, by which its head is asked for.
        kind: "full", or the kind of adapter.
        model_class_name: the architecture that it was trained as, if it says so.
        task_vectors: its changes of the base, by place.
        head: the parameters that it has and the base does not.
        ignored: tensors of its files that its own model class does not know.
        preparation: what has to be computed before its task vectors can be read.
        notes: what the report shall say of it.
    """

    name: str
    location: Location
    kind: str
    model_class_name: str | None
    task_vectors: dict[Place, TaskVector]
    head: Head | None = None
    ignored: list[str] = field(default_factory=list)
    preparation: Preparation | None = None
    notes: list[str] = field(default_factory=list)


def check_complete(
    location: Location,
    skeleton: Skeleton,
    tensors: Mapping[str, StoredTensor],
    places: Mapping[str, Place | None],
    main: Path,
) -> None:
    """Raise a `MergeError` if a checkpoint lacks a parameter of its own model class, or a piece of one."""
    parameter = missing_parameter(skeleton, places)
    if parameter:
        raise MergeError(
            f"{location} lacks the parameter {parameter}, which its class {skeleton.model_class.__name__} has: "
            f"it is not in {main}. Save or download the model again."
        )
    parameter = skeleton.misfit(stored_form(tensors, places))
    if parameter:
        raise MergeError(
            f"The tensors of {main} that make up the parameter {parameter} do not fit its shape "
            f"{skeleton.shapes[parameter]}: some are missing, or of another model. Save or download {location} again."
        )


def stored_form(tensors: Mapping[str, StoredTensor], places: Mapping[str, Place | None]) -> StoredForm:
    """Place and shape of the tensors that the model knows."""
    return {
        name: (place, tensors[name].shape) for name, place in places.items() if place is not None and name in tensors
    }


def missing_parameter(skeleton: Skeleton, places: Mapping[str, Place | None]) -> str | None:
    """The first parameter of a model class that is at none of the places of a checkpoint."""
    stored = {
        parameter for place in places.values() if place is not None for parameter in (place.parameter, *place.also)
    }
    parameters = (parameter for parameter, _ in skeleton.model.named_parameters())
    return next((name for name in parameters if skeleton.ties.get(name, name) not in stored), None)


def mismatch(name: str, base: StoredTensor, theirs: StoredTensor, skeleton: Skeleton, place: Place) -> str:
    """The sentence that says why two tensors of the same place cannot be merged."""
    sides = f"{name} is {theirs.shape} in {theirs.path}, but {base.shape} in the base's {base.path}."
    if skeleton.is_vocabulary(place.parameter) and theirs.shape[1:] == base.shape[1:]:
        return f"The vocabularies differ: {sides} {VOCABULARY_REMEDY}"
    return f"The shapes differ: {sides} Experts must be fine-tunes of this very base; check base_model."


def is_mergeable(tensor: StoredTensor) -> bool:
    """Whether a tensor is a floating-point parameter; the others are copied from the base."""
    return tensor.dtype in MERGEABLE


def without_tied_copies(
    tensors: Mapping[str, StoredTensor], places: Mapping[str, Place | None]
) -> dict[str, StoredTensor]:
    """A checkpoint's tensors with each tied parameter once.

    Files written by other tools, and ``.bin`` files, hold tied parameters under each of their names.

    Raises:
        MergeError: if two copies of a tied parameter differ.
    """
    kept: dict[Place, str] = {}
    for name in sorted(tensors, key=lambda name: places[name] != Place(name)):
        place = places[name]
        if place is None or place not in kept:
            kept[place or Place(name)] = name
        elif not same_values(tensors[name], tensors[kept[place]]):
            raise MergeError(
                f"{name} and {kept[place]} differ in {tensors[name].path}, but the model's config.json ties them "
                "(tie_word_embeddings). Set it to false in the config.json of the base and of every expert."
            )
    names = set(kept.values())
    return {name: tensor for name, tensor in tensors.items() if name in names}


def same_values(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether `a` holds the values of `b`, as they are in the dtype of `a`; taken for granted before the download."""
    if a.shape != b.shape:
        return False
    if is_remote(a) or is_remote(b):
        return True
    layout = Layout(1, 1, Layout.of(a.shape, None).width, 1)
    blocks = (
        Block(0, i, min(i + COMPARED_AT_ONCE, layout.neurons)) for i in range(0, layout.neurons, COMPARED_AT_ONCE)
    )
    return all(torch.equal(read_rows(a, layout, block), read_rows(b, layout, block).to(a.dtype)) for block in blocks)
