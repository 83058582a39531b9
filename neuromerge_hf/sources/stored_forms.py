"""An expert's tensors in the form in which the base stores them: fused or split, transposed or not."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from neuromerge_hf.errors import MergeError, abridged
from neuromerge_hf.skeleton import Place, Shape, Skeleton, StoredForm
from neuromerge_hf.sources.computed import Form, Preparation
from neuromerge_hf.sources.expert import Base, stored_form
from neuromerge_hf.storage.tensors import StoredTensor, read_whole


def to_base_form(
    tensors: Mapping[str, StoredTensor], places: Mapping[str, Place | None], base: Base, main: Path
) -> tuple[dict[str, StoredTensor], dict[str, Place | None], Preparation | None]:
    """Replace the tensors that the base stores in another form by ones in its form, which are computed later.

    Args:
        tensors: a checkpoint's.
        places: of each in the base's model.
        main: the checkpoint's file, for messages.

    Returns:
        Tensors and places, where those that are converted have the base's names, and how they are computed.

    Raises:
        MergeError: if transformers cannot convert them.
    """
    theirs = _by_parameter(stored_form(tensors, places))
    ours = _by_parameter(stored_form(base.tensors, base.places))
    conversions = []
    for parameters in _stored_together(theirs, ours):
        source, target = (
            {name: entry for parameter in parameters for name, entry in side.get(parameter, {}).items()}
            for side in (theirs, ours)
        )
        if source and target and set(source.values()) != set(target.values()):
            conversions.append((source, target))
    if not conversions:
        return dict(tensors), dict(places), None

    forms: dict[str, Form] = {}
    problems = []
    for source, target in conversions:
        empty = {
            name: torch.empty(shape, dtype=tensors[name].dtype, device="meta") for name, (_, shape) in source.items()
        }
        try:
            converted = _convert(empty, source, target, base.skeleton)
        except MergeError as error:
            problems.append(f"{next(iter(source))} of {main} is stored in another form than the base's: {error}")
        else:
            forms |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in converted.items()}
    if problems:
        raise MergeError(abridged(problems))

    def compute() -> Iterator[tuple[str, Tensor]]:
        for source, target in conversions:
            yield from _convert(
                {name: read_whole(tensors[name]) for name in source}, source, target, base.skeleton
            ).items()

    preparation = Preparation(forms, compute, main)
    replaced = {name for source, _ in conversions for name in source}
    kept = {name: tensor for name, tensor in tensors.items() if name not in replaced}
    return (
        kept | preparation.tensors,
        {name: places[name] for name in kept} | {name: base.places[name] for name in forms},
        preparation,
    )


def _by_parameter(form: StoredForm) -> dict[str, dict[str, tuple[Place, Shape]]]:
    found: dict[str, dict[str, tuple[Place, Shape]]] = defaultdict(dict)
    for name, (place, shape) in form.items():
        found[place.parameter][name] = place, shape
    return found


def _stored_together(*sides: Mapping[str, StoredForm]) -> list[list[str]]:
    """Groups of parameters that share stored tensors, of those that are stored in pieces on any side."""
    groups: dict[str, list[str]] = {}
    for side in sides:
        for form in side.values():
            place, _ = next(iter(form.values()))
            if place.piece is not None:
                joined = sorted({*place.parameters, *(p for name in place.parameters for p in groups.get(name, []))})
                groups |= dict.fromkeys(joined, joined)
    return list({id(group): group for group in groups.values()}.values())


def _convert(
    tensors: dict[str, Tensor], source: StoredForm, target: StoredForm, skeleton: Skeleton
) -> dict[str, Tensor]:
    parameters = skeleton.to_parameters(tensors, {name: place for name, (place, _) in source.items()})
    tensors.clear()  # they may be as large as a layer
    for name in sorted({name for place, _ in target.values() for name in place.parameters}):
        if name not in parameters:
            raise MergeError(f"the parameter {name} is missing.")
        if tuple(parameters[name].shape) != skeleton.shapes[name]:
            raise MergeError(
                f"the parameter {name} is {tuple(parameters[name].shape)}, but {skeleton.shapes[name]} in the base. "
                "Experts must be fine-tunes of this very base; check base_model."
            )
    return skeleton.to_stored(parameters, target)
