"""Choosing the lambdas on validation data (the paper's first branch), without merging again for each candidate."""

import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from neuromerge_hf.assembly.assemble import assemble, compute_adapters, save_heads
from neuromerge_hf.engine.cpu_kernel import find_kernel
from neuromerge_hf.engine.device import find_device
from neuromerge_hf.engine.passes import Passes
from neuromerge_hf.errors import MergeError
from neuromerge_hf.folder.directory import work_folder
from neuromerge_hf.folder.inputs import InputHasher, unchanged_inputs
from neuromerge_hf.folder.report import MergeReport
from neuromerge_hf.loading.classes import class_of_files
from neuromerge_hf.loading.heads import load_with_head, share_backbone
from neuromerge_hf.methods.neuromerging import NeuroMerging, NeuroMergingConfig
from neuromerge_hf.options import with_options
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.planning.planner import plan_with_weights, with_config
from neuromerge_hf.planning.preflight import check_settings
from neuromerge_hf.planning.resolve import resolve
from neuromerge_hf.spec import MergeSpec, Models, Runtime, split_options
from neuromerge_hf.storage.files import HEADS
from neuromerge_hf.storage.paths import user_folder, user_path
from neuromerge_hf.text import readable_size
from neuromerge_hf.tuning.components import LambdaComponents
from neuromerge_hf.tuning.evaluation import Evaluate, Scores, check_evaluation, name_of, run_evaluation
from neuromerge_hf.tuning.search import Search, TuningGrid
from neuromerge_hf.tuning.trials import Trial, save_table


@dataclass(frozen=True)
class Tuning:
    """The result of `tune_lambdas`.

    Attributes:
        config: the best hyper-parameters, with numbers for the lambdas.
        trials: every candidate with its score, in the order in which they were tried.
        best: the candidate that `config` describes.
        model: the merged model with the best hyper-parameters, as transformers loads it.
        report: the report of the merge in the output directory; None without an output directory.
        seconds: the wall time in seconds.
        evaluating: the part of `seconds` that was spent in the user's function.

    Examples:
        >>> def evaluate(model):
        ...     return -float(model.lm_head.weight.norm())
        >>> found = tune_lambdas(["math"], evaluate, base_model="base", grid=TuningGrid((0.0,), (1.0,), rounds=0))
        >>> found.best.is_rule
        True
    """

    config: NeuroMergingConfig
    trials: list[Trial]
    best: Trial
    model: PreTrainedModel
    report: MergeReport | None
    seconds: float
    evaluating: float


@with_options(MergeSpec, Runtime, without=("config",), takes_others=True)
def tune_lambdas(
    models: Models,
    evaluate: Evaluate,
    *,
    config: NeuroMergingConfig | str | Mapping[str, Any] | None = None,
    grid: TuningGrid | None = None,
    densities: Sequence[float] | None = None,
    metric: str | None = None,
    greater_is_better: bool = True,
    output_dir: str | os.PathLike[str] | None = None,
    auto_class: Any = None,
    work_dir: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Tuning:
    """Find the lambdas, and optionally the density, with which the merge scores best on validation data.

    The parallel and orthogonal parts are computed once for each density, and each candidate is written into one live
    model in place. The automatic rule is one of the candidates and wins a tie. The parts are stored in files: besides
    the live model, only one tensor of each part is in memory.

    Args:
        models: the experts, as in `merge`.
        evaluate: a function that takes the merged model in evaluation mode and returns its score, a dictionary of
            scores by task, or a dictionary of lists of scores by example. Or a dictionary of such functions by expert
            name, each of which gets the merged model with that expert's own head. They must not change the weights.
            Use validation data: a score that was tuned on says little about new data.
        config: the hyper-parameters that are not tuned. Other methods than NeuroMerging have no lambdas. Default:
            NeuroMerging's defaults.
        grid: the lambdas to try.
        densities: the densities to try; by default only that of `config`. Each costs about as much as a merge.
        metric: the task whose score counts; by default the mean over all tasks.
        greater_is_better: whether the largest score is the best.
        output_dir: the folder for the best merge, with a table and a picture of all candidates. It appears once it is
            complete. By default nothing is written.
        auto_class: the Auto class or model class of transformers to load the model with; by default the experts' class,
            or the base's class if the experts' classes differ or have heads of their own.
        work_dir: the folder for temporary files, which take three to four times the size of the model in float32. The
            default is beside the output directory, or the system's temporary folder.
        **options: any other argument of `from_pretrained`, for the live model.

    Returns:
        The best hyper-parameters, the merged model that has them, and every candidate with its score.

    Raises:
        MergeError: if the models cannot be merged, a file of theirs changes meanwhile, or `evaluate` does not return a
            score.

    Examples:
        >>> def evaluate(model):
        ...     return -float(model.lm_head.weight.norm())
        >>> found = tune_lambdas(["math", "code-lora"], evaluate, base_model="base", grid=TuningGrid(rounds=0))
        >>> len(found.trials)
        15
    """
    started = time.perf_counter()
    if isinstance(config, Mapping):
        config = {"method": NeuroMergingConfig.method, **config}
    spec, runtime, others = split_options(
        models, {**options, "config": NeuroMergingConfig() if config is None else config}
    )
    if type(spec.config) is not NeuroMergingConfig:
        raise MergeError(f"Lambdas are NeuroMerging's: config must be a NeuroMergingConfig, not {spec.config!r}.")
    check_evaluation(evaluate)
    if not isinstance(grid, TuningGrid | None):
        raise MergeError(f"grid must be a TuningGrid, not {grid!r:.200}.")
    if not isinstance(densities, Sequence | None) or isinstance(densities, str):
        raise MergeError(f"densities must be a list of numbers, not {densities!r:.200}.")
    for density in densities or ():
        dataclasses.replace(spec.config, density=density)  # raises if it is out of range
    target = None if output_dir is None else user_path(output_dir, "output_dir").absolute()
    problems = check_settings(spec, runtime, target)
    plan = plan_with_weights(spec, runtime, resolve(spec, runtime.access, problems), target)
    tuning = tune_plan(
        plan,
        runtime,
        evaluate,
        grid=grid or TuningGrid(),
        densities=densities or (),
        metric=metric,
        greater_is_better=greater_is_better,
        target=target,
        auto_class=auto_class,
        work_dir=work_dir,
        load_options=others,
    )
    return dataclasses.replace(tuning, seconds=time.perf_counter() - started)


def tune_plan(
    plan: MergePlan,
    runtime: Runtime,
    evaluate: Evaluate,
    *,
    grid: TuningGrid,
    densities: Sequence[float] = (),
    metric: str | None = None,
    greater_is_better: bool = True,
    target: Path | None = None,
    auto_class: Any = None,
    work_dir: str | os.PathLike[str] | None = None,
    load_options: Mapping[str, Any] | None = None,
) -> Tuning:
    """Do what `tune_lambdas` does, for a plan for NeuroMerging whose weights are on this machine."""
    started = time.perf_counter()
    config, device = plan.config, find_device(runtime.device)
    assert isinstance(config, NeuroMergingConfig)
    loading = dict(load_options or {})
    loading |= {"trust_remote_code": True} if runtime.trust_remote_code else {}
    loading |= {"token": runtime.token} if runtime.token is not None else {}

    def load(folder: Path, **arguments: Any) -> Any:
        model_class = class_of_files(folder, auto_class, trust_remote_code=runtime.trust_remote_code)
        return model_class.from_pretrained(folder, **arguments)

    with work_folder(_work_parent(work_dir, target, plan)) as folder:
        with unchanged_inputs(plan.locations):
            compute_adapters(plan, folder / "computed")
            save_heads(plan, folder / HEADS)
        (folder / "parts").mkdir()
        parts = LambdaComponents(plan, folder / "parts", load, device, runtime.trust_remote_code)

        @cache
        def task_model(head: str) -> PreTrainedModel:
            return load_with_head(parts.base_folder, folder / HEADS, head, folder / "links", "evaluate", **loading)

        def evaluate_live(model: PreTrainedModel) -> Scores:
            def model_with_head(head: str | None) -> PreTrainedModel:
                return model if head is None else share_backbone(task_model(head), model).eval()

            return run_evaluation(evaluate, model_with_head)

        search = Search(parts, evaluate_live, metric, greater_is_better, loading)

        def compute(density: float) -> NeuroMerging:
            at_density = dataclasses.replace(config, density=density)
            with unchanged_inputs(plan.locations):
                kernel = find_kernel(device, plan.units)
                fitted = NeuroMerging.fit(at_density, Passes(plan.work, device, plan.threads, kernel=kernel))
                parts.compute(fitted)
            return fitted

        tried = list(dict.fromkeys(densities or (config.density,)))
        for density in tried:
            search.run(density, compute(density), grid)
        best = search.best
        if best.density != tried[-1]:  # the parts of the last density are still stored
            compute(best.density)
        parts.set_lambdas(search.model, best.lambda_parallel, best.lambda_orthogonal)
    chosen = dataclasses.replace(
        config,
        density=best.density,
        lambda_parallel=best.lambda_parallel,
        lambda_orthogonal=best.lambda_orthogonal,
    )
    report = None
    if target:
        tuned = with_config(plan, chosen, tuned_on=plan.spec.tuned_on or name_of(evaluate))
        with InputHasher(plan.base.location, [expert.location for expert in plan.experts]) as inputs:
            report = assemble(
                tuned, target, runtime, inputs, lambda made: save_table(search.trials, best, made, greater_is_better)
            )
    seconds = time.perf_counter() - started
    return Tuning(chosen, search.trials, best, search.model, report, seconds, search.seconds)


def _work_parent(work_dir: str | os.PathLike[str] | None, target: Path | None, plan: MergePlan) -> Path:
    """The folder for temporary files. Its disk has enough space for the parts."""
    parent = next(path for path in target.parents if path.exists()) if target else Path(tempfile.gettempdir())
    parent = parent if work_dir is None else user_folder(work_dir, "work_dir")
    entries = sum(unit.entries for unit in plan.units)
    needed = 16 * entries + sum(unit.nbytes for unit in plan.units) + plan.costs.disk
    usage = shutil.disk_usage(parent)
    if usage.free < needed and usage.total > 0:
        raise MergeError(
            f"No space on the disk: {readable_size(needed)} are needed to tune, but only {readable_size(usage.free)} "
            f"are free in {parent}. Free some space, or choose another folder with work_dir."
        )
    return parent
