"""Untying the embeddings of a base, for experts that change only one of them."""

import copy
import dataclasses
from collections.abc import Mapping

from neuromerge_hf.skeleton import Skeleton, skeleton_of
from neuromerge_hf.sources.base import Base
from neuromerge_hf.sources.checks import stored_form
from neuromerge_hf.storage.tensors import StoredTensor


def untied(base: Base) -> Base:
    """The base with a tensor of its own for each tied embedding; the same base if it cannot be untied."""
    skeleton = untied_skeleton(base.skeleton)
    copies = separable(base.skeleton)
    if not copies:
        return base
    tensors = dict(base.tensors)
    for name, original in missing_copies(tensors, skeleton, copies).items():
        tensors[name] = renamed(tensors[original], name)
    refs = skeleton.refs(tensors)
    layouts, unknown = skeleton.stored_layouts(stored_form(tensors, refs))
    return Base(base.location, skeleton.model.config, skeleton, tensors, refs, layouts, unknown, copies)


def untied_skeleton(skeleton: Skeleton) -> Skeleton:
    """The skeleton of the same model with tie_word_embeddings off."""
    config = copy.deepcopy(skeleton.model.config)
    config.tie_word_embeddings = False
    return skeleton_of(skeleton.model_class, config)


def separable(skeleton: Skeleton) -> dict[str, str]:
    """The tied parameters that can be untied, each with the parameter whose weights it shares.

    Encoder-decoder models have none, because some of them scale their output only if it is tied.
    """
    if not skeleton.ties or skeleton.model.config.is_encoder_decoder:
        return {}
    still_tied = untied_skeleton(skeleton).ties
    return {name: owner for name, owner in skeleton.ties.items() if name not in still_tied}


def missing_copies(
    tensors: Mapping[str, StoredTensor], skeleton: Skeleton, copies: Mapping[str, str]
) -> dict[str, str]:
    """The copies that a tied checkpoint does not store, each with the name of the stored tensor to copy."""
    stored = {ref.parameter: name for name, ref in skeleton.refs(tensors).items() if ref}
    return {name: stored[owner] for name, owner in copies.items() if owner in stored and name not in stored}


def renamed(tensor: StoredTensor, name: str) -> StoredTensor:
    """The same tensor under another name."""
    return dataclasses.replace(tensor, name=name)  # type: ignore[type-var]  # all stored tensors are dataclasses
