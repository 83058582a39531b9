"""Finding and checking everything that a merge needs, before any weight is read."""

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial

import torch
from transformers import PretrainedConfig

from neuromerge_hf.align import adapter_rows, align, comparable, resized_base
from neuromerge_hf.checkpoint import CHECKPOINT_FILES, find_weights, open_weights
from neuromerge_hf.config import NeuroMergingConfig
from neuromerge_hf.errors import MergeError, Problems, abridged
from neuromerge_hf.layout import Layout
from neuromerge_hf.location import Location
from neuromerge_hf.merged_head import merge_heads as merge_experts_heads
from neuromerge_hf.models import FoundModels, ModelId, about_quantised_base, find_models, load_config, unique_names
from neuromerge_hf.plan import MergePlan, Unit
from neuromerge_hf.skeleton import Skeleton, model_class_of
from neuromerge_hf.sources.expert import Base, Expert, check_complete, is_mergeable, stored_form, without_tied_copies
from neuromerge_hf.sources.full import check_architecture, has_two_matrices, open_full
from neuromerge_hf.ties import untied
from neuromerge_hf.tokenizer import Candidate, choose_tokenizer
from neuromerge_hf.vocabulary import vocabulary_size


def plan_merge(
    models: Sequence[ModelId],
    *,
    base_model: ModelId | None = None,
    config: NeuroMergingConfig | None = None,
    dtype: str | torch.dtype = "auto",
    tokenizer: str = "base",
    chat_template: str | None = None,
    merge_heads: bool = False,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> MergePlan:
    """Find and check everything that a merge needs; see `neuromerge_hf.merge` for the arguments.

    Raises:
        MergeError: with all the problems that were found.
    """
    resolve_dtype(dtype)
    found = find_models(models, base_model, token)
    return plan_found(
        found, config or NeuroMergingConfig(), dtype, trust_remote_code, tokenizer, chat_template, merge_heads
    )


def plan_found(
    found: FoundModels,
    config: NeuroMergingConfig,
    dtype: str | torch.dtype,
    trust_remote_code: bool,
    tokenizer: str = "base",
    chat_template: str | None = None,
    merge_heads: bool = False,
) -> MergePlan:
    """`plan_merge` for models whose folders are known.

    Raises:
        MergeError: with all the problems that were found.
    """
    target = resolve_dtype(dtype)
    problems = Problems()

    base_location, locations, adapters = found
    base_config = load_config(base_location, trust_remote_code)
    base_class = model_class_of(base_config, base_location.folder, trust_remote_code)
    skeleton = Skeleton(base_class, base_config)
    expert_configs: list[PretrainedConfig | None] = []
    for location, adapter in zip(locations, adapters, strict=True):
        expert_configs.append(None if adapter else problems.attempt(partial(load_config, location, trust_remote_code)))
        if expert_configs[-1]:
            like = comparable(skeleton, base_location, location, expert_configs[-1])
            problems.add(check_architecture(location, expert_configs[-1], like, base_location, trust_remote_code))
    problems.report()

    for location in (base_location, *locations):
        location.fetch_weights()
    base = open_base(base_location, base_config, skeleton)
    unties = any(
        config and has_two_matrices(location, config, skeleton, trust_remote_code)
        for location, config in zip(locations, expert_configs, strict=True)
    )
    if any(adapters):
        from neuromerge_hf.sources.adapter import changes_one_of_two, open_adapter  # PEFT, which only adapters need

        located = zip(locations, adapters, strict=True)
        unties |= any(adapter and changes_one_of_two(location, adapter, base) for location, adapter in located)
    if unties:
        base = untied(base)
    names = unique_names(locations)
    candidates = [
        Candidate(
            name,
            location,
            expert_config or base_config,
            vocabulary_size(expert_config) if expert_config else adapter_rows(location.folder, base),
        )
        for name, location, expert_config in zip(names, locations, expert_configs, strict=True)
    ]
    choice = choose_tokenizer(tokenizer, chat_template, base_location, base_config, candidates, trust_remote_code)
    alignment = choice.alignment
    openers: list[Callable[[], Expert]] = []
    for candidate, adapter, expert_config in zip(candidates, adapters, expert_configs, strict=True):
        name, location = candidate.name, candidate.location
        theirs = resized_base(base, candidate.rows) if alignment else base
        if adapter is not None:
            notes = about_quantised_base(location, adapter, base_location)
            openers.append(partial(open_adapter, name, location, adapter, theirs, notes))
        elif expert_config is not None:
            openers.append(partial(open_full, name, location, expert_config, theirs, trust_remote_code))
    experts = problems.collect(openers)
    if alignment:
        base, experts = align(base, experts, [adapter is not None for adapter in adapters], alignment)
    head = None
    if merge_heads:
        experts, head = merge_experts_heads(experts)
    units = _units(base, experts, config, target)
    if head:
        units += head.units(target)
    dtype_name = "auto" if target is None else str(target).removeprefix("torch.")
    plan = MergePlan(config, base, tuple(experts), units, dtype_name, choice, head)
    if not plan.merged:
        raise MergeError("No expert changes any parameter of the base that is not excluded. There is nothing to merge.")
    return plan


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The dtype of the output; None for "auto", each tensor's own dtype in the base."""
    if dtype == "auto":
        return None
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise MergeError(f'dtype must be "auto", "float32", "float16" or "bfloat16", not {dtype!r}.')
    return resolved


def open_base(location: Location, config: PretrainedConfig, skeleton: Skeleton) -> Base:
    """Open the base's weights, from their headers alone."""
    main = find_weights(location.folder, CHECKPOINT_FILES)
    if main is None:
        raise MergeError(f"The base {location} has no weights: it holds none of {', '.join(CHECKPOINT_FILES)}.")
    tensors = open_weights(main)
    places = skeleton.places(tensors)
    tensors = without_tied_copies(tensors, places)
    known = stored_form(tensors, places)
    if not known:
        raise MergeError(
            f"{main} holds no parameter of the class {skeleton.model_class.__name__}. Check its config.json."
        )
    check_complete(location, skeleton, tensors, places, main)
    return Base(location, config, skeleton, tensors, places, *skeleton.stored_layouts(known))


def _units(
    base: Base, experts: Sequence[Expert], config: NeuroMergingConfig, dtype: torch.dtype | None
) -> tuple[Unit, ...]:
    units = []
    problems = []
    unused = set(config.exclude)
    for name, tensor in sorted(base.tensors.items()):
        place = base.places[name]
        parameter = place.parameter if place else name
        excluding = {
            pattern for pattern in config.exclude if fnmatchcase(parameter, pattern) or fnmatchcase(name, pattern)
        }
        unused -= excluding
        vectors = [expert.task_vectors.get(place) for expert in experts] if place else []
        merged = is_mergeable(tensor) and not excluding and any(vectors)
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
            )
        )
    if problems:
        raise MergeError(abridged(problems))
    if unused:
        raise MergeError(
            f"exclude={sorted(unused)} matches no parameter of {base.location}. "
            f"Its parameters have names such as {units[0].parameter}."
        )
    return tuple(units)
