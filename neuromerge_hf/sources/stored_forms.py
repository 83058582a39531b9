"""Conversion of an expert's tensors to the form in which the base stores them: fused or split, transposed or not."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from neuromerge_hf.errors import MergeError, abridged
from neuromerge_hf.skeleton import ParameterRef, Shape, Skeleton, StoredForm
from neuromerge_hf.sources.base import Base
from neuromerge_hf.sources.checks import stored_form
from neuromerge_hf.sources.computed import ComputedTensors, Form
from neuromerge_hf.storage.tensors import StoredTensor, read_whole


def to_base_form(
    tensors: Mapping[str, StoredTensor], refs: Mapping[str, ParameterRef | None], base: Base, main: Path
) -> tuple[dict[str, StoredTensor], dict[str, ParameterRef | None], ComputedTensors | None]:
    """Replace the tensors that the base stores in another form by tensors in its form, which are computed later.

    Args:
        tensors: the tensors of an expert's checkpoint, by name.
        refs: the parameter of the base's model that each tensor holds.
        main: the checkpoint's file, for messages.

    Returns:
        All tensors and the parameters that they hold, by the base's names for converted tensors; and the computation of
        the converted tensors, None if there are none.

    Raises:
        MergeError: if transformers cannot convert them.
    """
    theirs = _by_parameter(stored_form(tensors, refs))
    ours = _by_parameter(stored_form(base.tensors, base.refs))
    conversions = []
    for parameters in _stored_together(theirs, ours):
        source, target = (
            {name: entry for parameter in parameters for name, entry in side.get(parameter, {}).items()}
            for side in (theirs, ours)
        )
        if source and target and set(source.values()) != set(target.values()):
            conversions.append((source, target))
    if not conversions:
        return dict(tensors), dict(refs), None

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

    computed = ComputedTensors(forms, compute, main)
    replaced = {name for source, _ in conversions for name in source}
    kept = {name: tensor for name, tensor in tensors.items() if name not in replaced}
    return (
        kept | computed.tensors,
        {name: refs[name] for name in kept} | {name: base.refs[name] for name in forms},
        computed,
    )


def _by_parameter(form: StoredForm) -> dict[str, dict[str, tuple[ParameterRef, Shape]]]:
    found: dict[str, dict[str, tuple[ParameterRef, Shape]]] = defaultdict(dict)
    for name, (ref, shape) in form.items():
        found[ref.parameter][name] = ref, shape
    return found


def _stored_together(*sides: Mapping[str, StoredForm]) -> list[list[str]]:
    """Groups of the parameters that are stored in pieces on any side. Parameters of a group share stored tensors."""
    groups: dict[str, list[str]] = {}
    for side in sides:
        for form in side.values():
            ref, _ = next(iter(form.values()))
            if ref.piece is not None:
                joined = sorted({*ref.parameters, *(p for name in ref.parameters for p in groups.get(name, []))})
                groups |= dict.fromkeys(joined, joined)
    return list({id(group): group for group in groups.values()}.values())


def _convert(
    tensors: dict[str, Tensor], source: StoredForm, target: StoredForm, skeleton: Skeleton
) -> dict[str, Tensor]:
    parameters = skeleton.to_parameters(tensors, {name: ref for name, (ref, _) in source.items()})
    tensors.clear()  # frees memory: they may be as large as a layer
    for name in sorted({name for ref, _ in target.values() for name in ref.parameters}):
        if name not in parameters:
            raise MergeError(f"the parameter {name} is missing.")
        if tuple(parameters[name].shape) != skeleton.shapes[name]:
            raise MergeError(
                f"the parameter {name} is {tuple(parameters[name].shape)}, but {skeleton.shapes[name]} in the base. "
                "Experts must be fine-tunes of this very base; check base_model."
            )
    return skeleton.to_stored(parameters, target)
