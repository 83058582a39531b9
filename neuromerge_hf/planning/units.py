"""The units of a merge: each stored tensor of the base is merged or copied."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch

from neuromerge_hf.config import MergeConfig
from neuromerge_hf.errors import MergeError, abridged
from neuromerge_hf.sources.base import Base
from neuromerge_hf.sources.checks import is_mergeable
from neuromerge_hf.sources.expert import Expert
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.layout import Layout


def make_units(
    base: Base, experts: Sequence[Expert], config: MergeConfig, dtype: torch.dtype | None
) -> tuple[Unit, ...]:
    """Return a unit for every stored tensor of the base, in the order of their names.

    Args:
        base: the base model.
        experts: the experts in the user's order.
        config: the configuration whose `exclude` names parameters to copy.
        dtype: the dtype of the merged weights; None for each tensor's own.

    Raises:
        MergeError: if a merged tensor's neurons are not known, or a pattern of `config.exclude` matches nothing.
    """
    units = []
    problems = []
    unused = set(config.exclude)
    parameters = base.skeleton.parameters
    for name, tensor in sorted(base.tensors.items()):
        ref = base.refs[name]
        parameter = ref.parameter if ref else name
        excluding = {
            pattern for pattern in config.exclude if fnmatchcase(parameter, pattern) or fnmatchcase(name, pattern)
        }
        unused -= excluding
        vectors = [expert.task_vectors.get(ref) for expert in experts] if ref else []
        has_entries = math.prod(tensor.shape) > 0
        merged = is_mergeable(tensor) and has_entries and not excluding and any(vectors)
        layout = base.layouts.get(name)
        if merged and name in base.unknown:
            problems.append(f"{name} of {base.location} cannot be merged: {base.unknown[name]}")
        units.append(
            Unit(
                tensor=tensor,
                parameter=parameter,
                layout=(layout or Layout.of(tensor.shape, None))
                if merged
                else Layout(1, 1, math.prod(tensor.shape), 1),
                is_neuronal=merged and layout is not None,
                task_vectors=tuple(vectors) if merged else (),
                dtype=dtype if dtype and is_mergeable(tensor) else tensor.dtype,
                is_buffer=not (ref and parameters.intersection(ref.parameters)),
            )
        )
    if problems:
        raise MergeError(abridged(problems))
    if unused:
        raise MergeError(
            f"exclude={sorted(unused)} matches no parameter of {base.location}. "
            f"Its parameters have names such as {units[0].parameter}."
        )
    return for_method(units, config)


def for_method(units: Iterable[Unit], config: MergeConfig) -> tuple[Unit, ...]:
    """Return the same units, with the matrices that the configuration's method merges whole."""
    return tuple(
        dataclasses.replace(
            unit, by_matrix=config.by_matrix and bool(unit.task_vectors) and unit.is_neuronal and unit.layout.matrix > 0
        )
        for unit in units
    )


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """Return the dtype of the output; None for "auto", which keeps each tensor's dtype in the base.

    Raises:
        MergeError: if weights cannot be written in the dtype.
    """
    if dtype == "auto":
        return None
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise MergeError(f'dtype must be "auto", "float32", "float16" or "bfloat16", not {dtype!r}.')
    return resolved
