"""Plans a merge: finds and checks everything that it needs, before any weight is read."""

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

from neuromerge_hf.config import MergeConfig
from neuromerge_hf.engine.cpu_kernel import kernel_name
from neuromerge_hf.engine.device import default_threads
from neuromerge_hf.engine.method import Method
from neuromerge_hf.errors import MergeError, Problems
from neuromerge_hf.folder.inputs import unchanged_inputs
from neuromerge_hf.planning.configs import check_companions
from neuromerge_hf.planning.costs import companion_bytes, estimate
from neuromerge_hf.planning.named_base import other_base_notes
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.planning.preflight import check_disk, check_inputs_stay
from neuromerge_hf.planning.resolve import (
    Resolved,
    ResolvedExpert,
    input_notes,
    load_config,
    quantised_base_notes,
)
from neuromerge_hf.planning.sentence_modules import choose_modules
from neuromerge_hf.planning.units import for_method, make_units, resolve_dtype
from neuromerge_hf.skeleton import Skeleton, model_class_of, most_parts, skeleton_of
from neuromerge_hf.sources.base import Base, open_base
from neuromerge_hf.sources.expert import Expert
from neuromerge_hf.sources.full import check_architecture, has_untied_embeddings, open_full
from neuromerge_hf.sources.merged_head import merge_heads
from neuromerge_hf.sources.unnamed_class import name_class, names_class
from neuromerge_hf.sources.untying import untied
from neuromerge_hf.spec import MergeSpec, Runtime
from neuromerge_hf.storage.location import Location
from neuromerge_hf.storage.small_files import check_code
from neuromerge_hf.vocabulary.alignment import adapter_rows, align, comparable_skeleton, expert_rows, resized_base
from neuromerge_hf.vocabulary.tokenizer import ExpertVocabulary, choose_tokenizer

UNKNOWN_TENSORS = 100_000
"""The number of tensors of a model on the Hub whose files have no header. Hardly a model has more."""


def plan_with_weights(spec: MergeSpec, runtime: Runtime, resolved: Resolved, target: Path | None = None) -> MergePlan:
    """Plan a merge, download the weights that are missing, and return a plan of the files on this machine.

    Raises:
        MergeError: if the models cannot be merged, before weights are downloaded, or if a download fails.
    """
    plan = make_plan(spec, runtime, resolved, target)
    if plan.costs.bytes_to_download:
        resolved.fetch_weights()
        plan = make_plan(spec, runtime, resolved, target)  # the first plan refers to files on the Hub
    return plan


def make_plan(spec: MergeSpec, runtime: Runtime, resolved: Resolved, target: Path | None = None) -> MergePlan:
    """Check everything that a merge needs, from metadata alone.

    Args:
        spec: what to merge.
        runtime: how to run the merge.
        resolved: the models of the spec.
        target: the output directory, to check it as well.

    Raises:
        MergeError: if the models cannot be merged. It lists all problems, including those of `resolved`.
    """
    with unchanged_inputs(resolved.locations):
        return _make_plan(spec, runtime, resolved, target)


def _make_plan(spec: MergeSpec, runtime: Runtime, resolved: Resolved, target: Path | None) -> MergePlan:
    problems, trust_remote_code = resolved.problems, runtime.trust_remote_code
    dtype = problems.attempt(partial(resolve_dtype, spec.dtype))
    problems.attempt(partial(Method.of, spec.config))
    problems.attempt(partial(spec.config.expert_weights, len(spec.models)))
    if target:
        problems.attempt(partial(check_inputs_stay, target, resolved.locations))
    if trust_remote_code:
        for location in resolved.locations:
            if not location.commit:
                problems.attempt(partial(check_code, location.folder))
    experts = [_load_expert_config(expert, trust_remote_code, problems) for expert in resolved.experts]
    base_config = problems.attempt(partial(load_config, resolved.base, trust_remote_code))
    if base_config is None:
        raise problems.error
    downloaded = _name_class(resolved.base, base_config, None, trust_remote_code, problems)
    skeleton = problems.attempt(partial(_base_skeleton, resolved.base, base_config, trust_remote_code))
    if skeleton is None:
        raise problems.error
    for each in experts:
        if each.config and each.config.model_type == base_config.model_type:
            downloaded += _name_class(each.location, each.config, skeleton.model_class, trust_remote_code, problems)
    accepted = [each for each in experts if _config_fits(each, skeleton, resolved.base, trust_remote_code, problems)]
    downloaded += [name for location in resolved.locations for name in _download_headerless(location, problems)]
    base = problems.attempt(partial(open_base, resolved.base, base_config, skeleton))
    if base is None:
        raise problems.error
    fitting = [_FittingExpert.of(expert, base, trust_remote_code, problems) for expert in accepted]
    if any(expert.unties for expert in fitting):
        base = untied(base)

    # With problems, planning goes on only to find more of them, and an expert that gives the tokenizer may be missing.
    choice = problems.attempt(
        partial(
            choose_tokenizer,
            "base" if problems else spec.tokenizer,
            None if problems else spec.chat_template,
            resolved.base,
            base_config,
            [expert.vocabulary for expert in fitting],
            trust_remote_code,
        )
    )
    for location in resolved.locations:
        copied = location is resolved.base or bool(choice and choice.location is location)
        problems.attempt(partial(check_companions, location, copied=copied))
    alignment = choice.alignment if choice else None
    opened: list[Expert] = []
    for expert in fitting:
        with problems:
            opened.append(expert.open(resized_base(base, expert.vocabulary.rows) if alignment else base))
    units = problems.attempt(partial(make_units, base, opened, spec.config, dtype))
    problems.report()
    assert choice is not None
    assert units is not None

    head = None
    weights = spec.config.expert_weights(len(opened))
    if alignment:
        base, opened = align(base, opened, alignment, weights)
    if spec.merge_heads:
        opened, head = merge_heads(opened, weights)
    if alignment or head:
        units = make_units(base, opened, spec.config, dtype) + (head.units(dtype) if head else ())
    if not any(unit.task_vectors for unit in units):
        raise MergeError("No expert changes any parameter of the base that is not excluded. There is nothing to merge.")
    threads = runtime.threads or default_threads()
    modules, module_notes = choose_modules(resolved.base, [expert.location for expert in opened])
    beside = companion_bytes(resolved.base, choice.location, resolved.locations, modules)
    kernel = kernel_name(runtime.device)
    costs = estimate(units, opened, spec.config, threads, resolved.bytes_to_download, beside, kernel)
    if target:
        check_disk(costs, target)
    return MergePlan(
        spec,
        base,
        tuple(opened),
        units,
        choice,
        costs,
        head,
        tuple(downloaded),
        threads,
        modules,
        (*input_notes(resolved.base, resolved.experts), *module_notes),
        kernel,
    )


def can_share_plan(one: MergeConfig, other: MergeConfig, experts: int) -> bool:
    """Return whether the plan of a merge is the same with two configurations."""
    return one.exclude == other.exclude and one.expert_weights(experts) == other.expert_weights(experts)


def with_config(plan: MergePlan, config: MergeConfig, tuned_on: str | None = None) -> MergePlan:
    """Return the plan with another configuration.

    Args:
        plan: the plan to change.
        config: the new configuration. Its `exclude` and its `expert_weights` must be the same.
        tuned_on: the data on which the hyper-parameters were chosen.
    """
    assert can_share_plan(config, plan.config, len(plan.experts))
    spec = dataclasses.replace(plan.spec, config=config, tuned_on=tuned_on)
    units = for_method(plan.units, config)
    before = plan.costs
    costs = estimate(
        units, plan.experts, config, plan.threads, before.bytes_to_download, before.bytes_beside, plan.kernel
    )
    return dataclasses.replace(plan, spec=spec, units=units, costs=costs)


def _name_class(
    location: Location,
    config: PretrainedConfig,
    assumed: type[PreTrainedModel] | None,
    trust_remote_code: bool,
    problems: Problems,
) -> list[str]:
    """Name the class of a model whose configuration names none, and return the model if it was downloaded for that.

    Several possible classes of a base are no problem, unless an expert has the tensors that they have.
    """
    if names_class(location, config, trust_remote_code):
        return []
    downloaded = _download_headerless(location, problems)
    (problems if assumed else Problems()).attempt(partial(name_class, location, config, assumed))
    return downloaded


def _base_skeleton(base: Location, config: PretrainedConfig, trust_remote_code: bool) -> Skeleton:
    """Return the skeleton of the base, after its configuration was compared with the number of its tensors.

    Raises:
        MergeError: if no model of this configuration can be made.
    """
    stored = UNKNOWN_TENSORS
    with suppress(MergeError):  # the problem is found again when the base is opened
        main = base.find_weights()
        stored = len(base.open_weights(main)) if main and base.has_headers else UNKNOWN_TENSORS
    try:
        return skeleton_of(model_class_of(config, base.folder, trust_remote_code), config, most_parts(stored))
    except MergeError as error:
        raise MergeError([f"{base.folder / 'config.json'}: {problem}" for problem in error.problems]) from error


def _load_expert_config(expert: ResolvedExpert, trust_remote_code: bool, problems: Problems) -> ResolvedExpert:
    """Return a full checkpoint with its configuration, or without one if that is damaged; then record the problem."""
    if expert.adapter_config:
        return expert
    config = problems.attempt(partial(load_config, expert.location, trust_remote_code))
    return dataclasses.replace(expert, config=config)


def _config_fits(
    expert: ResolvedExpert, base: Skeleton, base_location: Location, trust_remote_code: bool, problems: Problems
) -> bool:
    """Return whether the configuration of an expert fits the base, and record problems if it does not."""
    if expert.adapter_config:
        return True
    if expert.config is None:
        return False
    try:
        like = comparable_skeleton(base, base_location, expert.location, expert.config)
    except MergeError as error:
        problems.add([f"{expert.location.folder / 'config.json'}: {problem}" for problem in error.problems])
        return False
    differences = check_architecture(expert.location, expert.config, like, base_location, trust_remote_code)
    problems.add(differences)
    return not differences


@dataclass(frozen=True)
class _FittingExpert:
    """An expert whose configuration fits the base.

    Attributes:
        expert: the resolved expert.
        vocabulary: the vocabulary of the expert.
        unties: whether the expert's input and output embeddings differ, while the base ties them.
        notes: sentences on the expert for the report.
        trust_remote_code: whether code from the expert's repository may run.
    """

    expert: ResolvedExpert
    vocabulary: ExpertVocabulary
    unties: bool
    notes: list[str]
    trust_remote_code: bool

    @classmethod
    def of(cls, expert: ResolvedExpert, base: Base, trust_remote_code: bool, problems: Problems) -> "_FittingExpert":
        """Find out what the tokenizer and the base must allow for, and record problems."""
        name, location, config = expert.name, expert.location, expert.config
        if config:
            rows = problems.attempt(partial(expert_rows, location, config, base))
            vocabulary = ExpertVocabulary(name, location, config, rows)
            unties = has_untied_embeddings(location, config, base.skeleton, trust_remote_code)
            return cls(expert, vocabulary, unties, other_base_notes(expert, base.location), trust_remote_code)
        # PEFT is imported for adapters alone.
        from neuromerge_hf.sources.peft.adapter import changes_one_tied_embedding

        rows = problems.attempt(partial(adapter_rows, location, base))
        unties = changes_one_tied_embedding(location, expert.adapter_config, base)
        notes = quantised_base_notes(expert, base.location) or other_base_notes(expert, base.location)
        return cls(expert, ExpertVocabulary(name, location, base.config, rows), unties, notes, trust_remote_code)

    def open(self, base: Base) -> Expert:
        """Open the expert from the headers of its files.

        Raises:
            MergeError: if a file is missing or damaged, or does not fit the base.
        """
        name, location = self.expert.name, self.expert.location
        if self.expert.config:
            opened = open_full(name, location, self.expert.config, base, self.trust_remote_code)
            return dataclasses.replace(opened, notes=[*self.notes, *opened.notes])
        from neuromerge_hf.sources.peft.adapter import open_adapter

        return open_adapter(name, location, self.expert.adapter_config, base, self.notes)


def _download_headerless(location: Location, problems: Problems) -> list[str]:
    """Download weights that have no header, unless there are problems already, and return the models downloaded."""
    if location.has_headers:
        return []
    problems.report()
    location.fetch_weights()
    return [str(location)]
