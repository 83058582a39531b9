"""Finding and checking everything that a merge needs, before any weight is read."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import PretrainedConfig

from neuromerge_hf.config import MergeConfig, NeuroMergingConfig
from neuromerge_hf.engine.device import default_threads
from neuromerge_hf.errors import MergeError, Problems
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.planning.preflight import check_disk, check_inputs_stay, check_output
from neuromerge_hf.planning.resolve import (
    FoundModels,
    ModelId,
    about_quantised_base,
    find_models,
    load_config,
    unique_names,
)
from neuromerge_hf.planning.units import make_units, resolve_dtype
from neuromerge_hf.skeleton import Skeleton, model_class_of
from neuromerge_hf.sources.base import Base, open_base
from neuromerge_hf.sources.expert import Expert
from neuromerge_hf.sources.full import check_architecture, has_two_matrices, open_full
from neuromerge_hf.sources.merged_head import merge_heads as merge_experts_heads
from neuromerge_hf.sources.untying import untied
from neuromerge_hf.storage.location import Location
from neuromerge_hf.vocabulary.alignment import adapter_rows, align, comparable, resized_base
from neuromerge_hf.vocabulary.tokenizer import ExpertVocabulary, choose_tokenizer
from neuromerge_hf.vocabulary.vocabulary import vocabulary_size


def plan_merge(
    models: Sequence[ModelId],
    *,
    base_model: ModelId | None = None,
    config: MergeConfig | None = None,
    dtype: str | torch.dtype = "auto",
    tokenizer: str = "base",
    chat_template: str | None = None,
    merge_heads: bool = False,
    output_dir: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> MergePlan:
    """Find and check everything that a merge needs, from metadata alone; see `neuromerge_hf.merge` for the arguments.

    Of models on the Hub only small files are downloaded (configurations, tokenizers, indexes), and the headers of
    safetensors files. ``.bin`` files have no header: where a model has nothing else, and its configuration shows
    nothing wrong, they are downloaded. What depends on values (a NaN, copies of a tied parameter that differ) is found
    by the merge.

    Args:
        output_dir: if given, it is also checked that the merged model can be written there.

    Raises:
        MergeError: with all the problems that were found, each with what to do.
    """
    problems = Problems()
    target = None if output_dir is None else Path(output_dir).expanduser().absolute()
    if target:
        problems.attempt(partial(check_output, target, overwrite))
    return plan_found(
        find_models(models, base_model, token, problems),
        config=config or NeuroMergingConfig(),
        dtype=dtype,
        tokenizer=tokenizer,
        chat_template=chat_template,
        merge_heads=merge_heads,
        target=target,
        threads=threads,
        trust_remote_code=trust_remote_code,
    )


def plan_found(
    found: FoundModels,
    *,
    config: MergeConfig,
    dtype: str | torch.dtype = "auto",
    tokenizer: str = "base",
    chat_template: str | None = None,
    merge_heads: bool = False,
    target: Path | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> MergePlan:
    """`plan_merge` for models whose folders are known.

    Raises:
        MergeError: with all the problems that were found, those of `found` among them.
    """
    problems = found.problems
    target_dtype = problems.attempt(partial(resolve_dtype, dtype))
    if target:
        problems.attempt(partial(check_inputs_stay, target, found.locations))
    expert_configs = [
        None if adapter else problems.attempt(partial(load_config, location, trust_remote_code))
        for location, adapter in zip(found.experts, found.adapters, strict=True)
    ]
    base_config = problems.attempt(partial(load_config, found.base, trust_remote_code))
    if base_config is None:
        raise problems.error
    skeleton = Skeleton(model_class_of(base_config, found.base.folder, trust_remote_code), base_config)

    fitting = _fitting(found, expert_configs, skeleton, trust_remote_code)
    downloaded = [name for model in found.locations for name in _download_headerless(model, problems)]
    base = problems.attempt(partial(open_base, found.base, base_config, skeleton))
    if base is None:
        raise problems.error
    candidates, openers, unties = _openers(found, expert_configs, fitting, base, trust_remote_code)
    if unties:
        base = untied(base)

    # Where some experts cannot be merged anyway, the others are only looked at for what else is wrong.
    choice = problems.attempt(
        partial(
            choose_tokenizer,
            "base" if problems else tokenizer,
            None if problems else chat_template,
            found.base,
            base_config,
            candidates,
            trust_remote_code,
        )
    )
    alignment = choice.alignment if choice else None
    experts: list[Expert] = []
    for candidate, open_expert in zip(candidates, openers, strict=True):
        with problems:
            experts.append(open_expert(resized_base(base, candidate.rows) if alignment else base))
    units = problems.attempt(partial(make_units, base, experts, config, target_dtype))
    problems.report()
    assert choice is not None
    assert units is not None

    head = None
    if alignment:
        base, experts = align(base, experts, [adapter is not None for adapter in found.adapters], alignment)
    if merge_heads:
        experts, head = merge_experts_heads(experts)
    if alignment or head:
        units = make_units(base, experts, config, target_dtype) + (head.units(target_dtype) if head else ())
    plan = MergePlan(
        config,
        base,
        tuple(experts),
        units,
        "auto" if target_dtype is None else str(target_dtype).removeprefix("torch."),
        choice,
        head,
        found.bytes_to_download,
        tuple(downloaded),
        threads or default_threads(),
    )
    if not plan.merged:
        raise MergeError("No expert changes any parameter of the base that is not excluded. There is nothing to merge.")
    if target:
        check_disk(plan, target)
    return plan


def _fitting(
    found: FoundModels, configs: Sequence[PretrainedConfig | None], base: Skeleton, trust_remote_code: bool
) -> list[int]:
    """The numbers of the experts whose configurations show nothing wrong; what is wrong with others is noted."""
    fitting = []
    for number, (location, config) in enumerate(zip(found.experts, configs, strict=True)):
        differences: list[str] = []
        if config:
            like = comparable(base, found.base, location, config)
            differences = check_architecture(location, config, like, found.base, trust_remote_code)
            found.problems.add(differences)
        if (config or found.adapters[number]) and not differences:
            fitting.append(number)
    return fitting


def _openers(
    found: FoundModels,
    configs: Sequence[PretrainedConfig | None],
    fitting: Sequence[int],
    base: Base,
    trust_remote_code: bool,
) -> tuple[list[ExpertVocabulary], list[Callable[[Base], Expert]], bool]:
    """What the vocabulary of each fitting expert may be, how it is opened, and whether one unties the embeddings."""
    candidates: list[ExpertVocabulary] = []
    openers: list[Callable[[Base], Expert]] = []
    unties = False
    names = unique_names(found.experts)
    for number in fitting:
        name, location, adapter, config = names[number], found.experts[number], found.adapters[number], configs[number]
        if adapter is not None:
            from neuromerge_hf.sources.peft.adapter import (  # PEFT, which only adapters need
                changes_one_of_two,
                open_adapter,
            )

            unties |= changes_one_of_two(location, adapter, base)
            notes = about_quantised_base(location, adapter, found.base)
            openers.append(partial(open_adapter, name, location, adapter, notes=notes))
            rows = found.problems.attempt(partial(adapter_rows, location, base))
            candidates.append(ExpertVocabulary(name, location, base.config, rows))
        elif config is not None:
            unties |= has_two_matrices(location, config, base.skeleton, trust_remote_code)
            openers.append(partial(open_full, name, location, config, trust_remote_code=trust_remote_code))
            candidates.append(ExpertVocabulary(name, location, config, vocabulary_size(config)))
    return candidates, openers, unties


def _download_headerless(location: Location, problems: Problems) -> list[str]:
    """Download weights that have no header, unless something else is wrong already; returns what was downloaded."""
    if location.has_headers:
        return []
    problems.report()
    location.fetch_weights()
    return [str(location)]
