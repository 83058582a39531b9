"""Checks that a checkpoint is complete, and that its tensors fit the base's."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from neuromerge_hf.errors import MergeError
from neuromerge_hf.skeleton import ParameterRef, Skeleton, StoredForm
from neuromerge_hf.storage.layout import Block, Layout
from neuromerge_hf.storage.location import Location
from neuromerge_hf.storage.tensors import MERGEABLE, StoredTensor, is_remote, read_rows

COMPARED_AT_ONCE = 1 << 20
"""How many entries `same_values` compares at a time."""

VOCABULARY_REMEDY = (
    "Put the tokenizer files of the base and of the expert into their folders, by which rows are aligned. Or resize "
    "the expert's embeddings to the base's vocabulary (model.resize_token_embeddings) and save it again."
)


def check_complete(
    location: Location,
    skeleton: Skeleton,
    tensors: Mapping[str, StoredTensor],
    refs: Mapping[str, ParameterRef | None],
    main: Path,
) -> None:
    """Raise a `MergeError` if a checkpoint lacks a parameter of its own model class or a piece of one."""
    parameter = missing_parameter(skeleton, refs)
    if parameter:
        raise MergeError(
            f"{location} lacks the parameter {parameter}, which its class {skeleton.model_class.__name__} has: "
            f"it is not in {main}. Save or download the model again."
        )
    parameter = skeleton.mismatched_parameter(stored_form(tensors, refs))
    if parameter:
        raise MergeError(
            f"The tensors of {main} that make up the parameter {parameter} do not fit its shape "
            f"{skeleton.shapes[parameter]}: some are missing, or of another model. Save or download {location} again."
        )


def stored_form(tensors: Mapping[str, StoredTensor], refs: Mapping[str, ParameterRef | None]) -> StoredForm:
    """The parameter and the shape of each tensor that the model has."""
    return {name: (ref, tensors[name].shape) for name, ref in refs.items() if ref is not None and name in tensors}


def missing_parameter(skeleton: Skeleton, refs: Mapping[str, ParameterRef | None]) -> str | None:
    """The first parameter of a model class that no tensor of a checkpoint holds; None if all are there.

    The pooling layer is not missing if all of it is: the model can have been made without one.
    """
    stored = {parameter for ref in refs.values() if ref is not None for parameter in (ref.parameter, *ref.also)}
    parameters = (parameter for parameter, _ in skeleton.model.named_parameters())
    missing = [name for name in parameters if skeleton.ties.get(name, name) not in stored]
    return missing[0] if missing and set(missing) != skeleton.pooling_layer else None


def mismatch(name: str, base: StoredTensor, theirs: StoredTensor, skeleton: Skeleton, ref: ParameterRef) -> str:
    """The error message for two tensors of the same parameter that differ in shape."""
    sides = f"{name} is {theirs.shape} in {theirs.path}, but {base.shape} in the base's {base.path}."
    if skeleton.is_vocabulary(ref.parameter) and theirs.shape[1:] == base.shape[1:]:
        return f"The vocabularies differ: {sides} {VOCABULARY_REMEDY}"
    return f"The shapes differ: {sides} Experts must be fine-tunes of this very base; check base_model."


def is_mergeable(tensor: StoredTensor) -> bool:
    """Whether a tensor has a dtype that can be merged. Other tensors are copied from the base."""
    return tensor.dtype in MERGEABLE


def without_tied_copies(
    tensors: Mapping[str, StoredTensor], refs: Mapping[str, ParameterRef | None]
) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint, with each tied parameter only once.

    Files written by other tools, and ``.bin`` files, hold a tied parameter under each of its names.

    Raises:
        MergeError: if two copies of a tied parameter differ.
    """
    kept: dict[ParameterRef, str] = {}
    for name in sorted(tensors, key=lambda name: refs[name] != ParameterRef(name)):
        ref = refs[name]
        if ref is None or ref not in kept:
            kept[ref or ParameterRef(name)] = name
        elif not same_values(tensors[name], tensors[kept[ref]]):
            raise MergeError(
                f"{name} and {kept[ref]} differ in {tensors[name].path}, but the model's config.json ties them "
                "(tie_word_embeddings). Set it to false in the config.json of the base and of every expert."
            )
    names = set(kept.values())
    return {name: tensor for name, tensor in tensors.items() if name in names}


def same_values(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors are equal in the dtype of `a`. Before the download, equal shapes are enough."""
    if a.shape != b.shape:
        return False
    if is_remote(a) or is_remote(b):
        return True
    layout = Layout(1, 1, Layout.of(a.shape, None).width, 1)
    blocks = (
        Block(0, i, min(i + COMPARED_AT_ONCE, layout.neurons)) for i in range(0, layout.neurons, COMPARED_AT_ONCE)
    )
    return all(_equal(read_rows(a, layout, block), read_rows(b, layout, block).to(a.dtype)) for block in blocks)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype are equal, where NaN equals NaN: it is reported when it is merged."""
    return torch.equal(a, b) or (
        a.dtype in MERGEABLE and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    )
