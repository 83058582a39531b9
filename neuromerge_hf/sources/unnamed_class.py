"""The model class of a checkpoint whose configuration names none, found by the names of its tensors.

Without it, the checkpoint is taken for the plain backbone, or for a model of the base's class, and its head is lost.
"""

import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from neuromerge_hf.errors import MergeError
from neuromerge_hf.skeleton import Skeleton, auto_model_class, model_class_of, skeleton_of
from neuromerge_hf.skeleton.limits import most_parts
from neuromerge_hf.sources.checks import missing_parameter, stored_form
from neuromerge_hf.storage.location import Location
from neuromerge_hf.storage.tensors import StoredTensor


def names_class(location: Location, config: PretrainedConfig, trust_remote_code: bool = False) -> bool:
    """Whether a configuration names a known class, or something else in transformers, which is refused later."""
    try:
        named = model_class_of(config, location.folder, trust_remote_code, default=PreTrainedModel)
    except MergeError:
        return True
    return named is not PreTrainedModel


def name_class(location: Location, config: PretrainedConfig, assumed: type[PreTrainedModel] | None = None) -> None:
    """Name the class in a configuration, in memory, if another class has tensors that the assumed one lacks.

    Args:
        location: a model whose headers can be read.
        config: its configuration, which names no class that is known.
        assumed: the class that such a model is taken for; None for the plain backbone.

    Raises:
        MergeError: if several classes have these tensors.
    """
    found = [each.__name__ for each in _classes_with_more(location, config, assumed)]
    if len(found) > 1:
        raise MergeError(
            f'{location.folder / "config.json"} names no class of transformers ("architectures"), and its tensors are '
            f"those of several: {', '.join(found)}. Name the class that the model was saved as there."
        )
    if found:
        config.architectures = found


def _classes_with_more(
    location: Location, config: PretrainedConfig, assumed: type[PreTrainedModel] | None
) -> list[type[PreTrainedModel]]:
    """The classes of an architecture that have most of a checkpoint's tensors; empty if the assumed one has as many."""
    try:
        main = location.find_weights()
        tensors = location.open_weights(main) if main else {}
        backbone = auto_model_class(transformers.AutoModel, config)
        lost = _lost(skeleton_of(assumed or backbone, config, most_parts(len(tensors))), tensors)
    except (MergeError, KeyError):  # weights that cannot be opened, or no architecture of transformers: reported later
        return []
    others: dict[type[PreTrainedModel], int] = {}
    for model_class in _classes_beside(backbone) if lost else []:
        with suppress(MergeError):  # not every class can be made of every configuration
            skeleton = skeleton_of(model_class, config, most_parts(len(tensors)))
            if missing_parameter(skeleton, skeleton.refs(tensors)) is None:
                others[model_class] = _lost(skeleton, tensors)
    fewest = min(others.values(), default=lost)
    best = [each for each, count in others.items() if count == fewest < lost]
    return [each for each in best if _fits(skeleton_of(each, config), tensors)] or best


def _classes_beside(backbone: type[PreTrainedModel]) -> list[type[PreTrainedModel]]:
    """The public model classes of an architecture, from the module of its backbone."""
    found: dict[str, Any] = vars(sys.modules[backbone.__module__])
    return [
        each
        for name, each in found.items()
        if isinstance(each, type)
        and issubclass(each, PreTrainedModel)
        and each.config_class is backbone.config_class
        and each.forward is not torch.nn.Module.forward  # not only a parent of classes
        and hasattr(transformers, name)
    ]


def _lost(skeleton: Skeleton, tensors: Mapping[str, StoredTensor]) -> int:
    """How many tensors of a checkpoint a model class does not have."""
    return sum(ref is None for ref in skeleton.refs(tensors).values())


def _fits(skeleton: Skeleton, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether the tensors have the shapes of the model class."""
    return skeleton.other_shape(stored_form(tensors, skeleton.refs(tensors))) is None
