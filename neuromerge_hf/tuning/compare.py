"""Comparing merging methods on the user's own tasks."""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.tqdm import tqdm
from transformers import PreTrainedModel

from neuromerge_hf.assembly.assemble import assemble
from neuromerge_hf.config import MergeConfig, as_config, config_classes
from neuromerge_hf.errors import MergeError
from neuromerge_hf.folder.directory import atomic_directory, work_folder
from neuromerge_hf.folder.inputs import InputHasher
from neuromerge_hf.loading.classes import class_of_files
from neuromerge_hf.loading.heads import load_with_head
from neuromerge_hf.methods.task_arithmetic import TaskArithmeticConfig
from neuromerge_hf.options import with_options
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.planning.planner import can_share_plan, plan_with_weights, with_config
from neuromerge_hf.planning.preflight import check_output, check_settings
from neuromerge_hf.planning.resolve import ResolvedExpert, resolve
from neuromerge_hf.spec import MergeSpec, Models, Runtime, split_options
from neuromerge_hf.storage.files import HEADS
from neuromerge_hf.storage.paths import user_folder, user_path
from neuromerge_hf.tuning.bootstrap import Interval, differences
from neuromerge_hf.tuning.comparison import FILES, NOT_COMPARED, Comparison
from neuromerge_hf.tuning.evaluation import Evaluate, Scores, check_evaluation, name_of, run_evaluation


@with_options(MergeSpec, Runtime, without=NOT_COMPARED, takes_others=True)
def compare_methods(
    models: Models,
    evaluate: Evaluate,
    *,
    methods: Sequence[MergeConfig | str | Mapping[str, Any]] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    auto_class: Any = None,
    work_dir: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Comparison:
    """Merge with each method, and evaluate each merge, the base and every expert.

    All models are loaded as the same class, without the experts' own heads. An expert is evaluated as the merge of that
    expert alone. A winner is named only if its average lead over every other method is statistically significant: a
    paired bootstrap over the examples, at 95% for all comparisons together. This needs scores by example.

    Args:
        models: the experts, as in `merge`.
        evaluate: a function that takes a model in evaluation mode and returns its score, a dictionary of scores by
            task, or a dictionary of lists of scores by example, always in the same order. Greater is better. Or a
            dictionary of such functions by expert name, each of which gets every model with that expert's own head.
        methods: the methods, each like `config` in `merge`; by default every method with its default settings.
        output_dir: the folder for ``comparison.json``, ``.md`` and ``.png``, which appears once they are complete. It
            may hold those of an earlier comparison, but no other files. By default nothing is written.
        auto_class: the Auto class or model class of transformers to load the models with.
        work_dir: the folder for each merge while it is evaluated; by default the system's temporary folder.
        **options: any other argument of `from_pretrained`.

    Returns:
        All scores, and the verdict.

    Raises:
        MergeError: if the models cannot be merged, a file of theirs changes meanwhile, or the scores cannot be
            compared.

    Examples:
        >>> def evaluate(model):
        ...     return {"size": [float(p.abs().mean()) for p in model.parameters()]}
        >>> found = compare_methods(["math", "code-lora"], evaluate, base_model="base", methods=[AverageConfig()])
        >>> list(found.methods)
        ['average']
    """
    for name in options:
        if name in NOT_COMPARED:
            raise TypeError(f"compare_methods has no argument {name!r}: {NOT_COMPARED[name]}.")
    check_evaluation(evaluate)
    parent = None if work_dir is None else user_folder(work_dir, "work_dir")
    if not isinstance(methods, Sequence | None) or isinstance(methods, str):
        raise MergeError(f'methods must be a list such as ["ties", AverageConfig()], not {methods!r:.200}.')
    target = None if output_dir is None else user_path(output_dir, "output_dir")
    chosen = [as_config(method) for method in methods or [config() for config in config_classes()]]
    configs = {label_of(config): config for config in chosen}
    unmerged = TaskArithmeticConfig(scale=0.0)
    spec, runtime, others = split_options(models, {**options, "config": unmerged})
    others |= {"trust_remote_code": True} if runtime.trust_remote_code else {}
    problems = check_settings(spec, runtime)
    if target:
        problems.attempt(partial(check_output, target, True, FILES, "comparison"))
    for config in configs.values():
        problems.attempt(partial(config.expert_weights, len(spec.models)))
    resolved = resolve(spec, runtime.access, problems)
    progress = tqdm(total=1 + len(spec.models) + len(configs), desc="Comparing", name="neuromerge_hf.comparison")

    with work_folder(parent or Path(tempfile.gettempdir())) as folder, progress:
        heads = folder / HEADS

        def evaluated(plan: MergePlan) -> Scores:
            merged = folder / "merged"
            shutil.rmtree(merged, ignore_errors=True)  # the one before
            with InputHasher(plan.base.location, [expert.location for expert in plan.experts]) as inputs:
                assemble(plan, merged, runtime, inputs)
            if (merged / HEADS).is_dir() and not heads.is_dir():  # the first merge has all experts' heads
                shutil.copytree(merged / HEADS, heads)

            def model_with_head(head: str | None) -> PreTrainedModel:
                if head is not None:
                    return load_with_head(merged, heads, head, folder / "links", "evaluate", **others)
                model_class = class_of_files(merged, auto_class, trust_remote_code=runtime.trust_remote_code)
                model: PreTrainedModel = model_class.from_pretrained(merged, **others)
                return model.eval()

            with torch.no_grad():
                scores = run_evaluation(evaluate, model_with_head)
            progress.update()
            return scores

        def planned(config: MergeConfig, experts: Sequence[ResolvedExpert] = resolved.experts) -> MergePlan:
            chosen = dataclasses.replace(resolved, experts=tuple(experts))
            return plan_with_weights(dataclasses.replace(spec, config=config), runtime, chosen, folder / "merged")

        full_plan = planned(unmerged)
        base = evaluated(full_plan)
        alone = TaskArithmeticConfig(scale=1.0)
        experts = {expert.name: evaluated(planned(alone, [expert])) for expert in resolved.experts}
        merges = {
            label: evaluated(
                with_config(full_plan, config)
                if can_share_plan(config, unmerged, len(spec.models))
                else planned(config)
            )
            for label, config in configs.items()
        }
    for name, scores in {**experts, **merges}.items():
        _check_same_tasks(evaluate, base, name, scores)
    comparison = Comparison(base, experts, merges, *judge(merges))
    if target:
        with atomic_directory(target, overwrite=True, files_of=lambda _: FILES) as folder:
            comparison.save(folder)
    return comparison


def judge(methods: dict[str, Scores]) -> tuple[dict[str, Interval], str | None, str]:
    """The best method's lead over each other method, the winner if there is one, and the verdict in words."""
    best = max(methods, key=lambda name: methods[name].average)
    others = {name: scores for name, scores in methods.items() if name != best}
    if not others:
        return {}, None, f"Only {best} was evaluated, so there is nothing to compare it with."
    lead = f"{best} has the best average, {methods[best].average:.4f}"
    if any(scores.examples.keys() != scores.tasks.keys() for scores in methods.values()):
        verdict = (
            f"{lead}, but no winner is declared: how much of the differences is noise is not known without scores "
            "by example. Let the evaluation return a list of them for each task."
        )
        return {}, None, verdict
    intervals = differences(methods[best].examples, {name: scores.examples for name, scores in others.items()})
    within = [name for name, interval in intervals.items() if interval.low <= 0]
    if within:
        verdict = f"{lead}, but no winner is declared: its lead is within the noise over {', '.join(within)}."
        return intervals, None, verdict
    return intervals, best, f"{lead}, and wins: its lead over every other method is statistically significant."


def label_of(config: MergeConfig) -> str:
    """The method's name, with the settings that are not the defaults."""
    default = type(config)().to_dict()
    chosen = [f"{name} {value}" for name, value in config.to_dict().items() if value != default[name]]
    return f"{config.method} ({', '.join(chosen)})" if chosen else config.method


def _check_same_tasks(evaluate: Evaluate, base: Scores, name: str, scores: Scores) -> None:
    def shape(of: Scores) -> dict[str, int | None]:
        return {task: len(of.examples[task]) if task in of.examples else None for task in of.tasks}

    if shape(scores) != shape(base):
        raise MergeError(
            f"{name_of(evaluate)} returned other tasks or another number of examples for {name} than for the base: "
            f"{shape(scores)} and {shape(base)}. It must evaluate all models on the same."
        )
