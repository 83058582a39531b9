"""Choosing the lambdas on validation data (the paper's first branch), without merging again for each candidate."""

import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from neuromerge_hf.api import merge
from neuromerge_hf.config import NeuroMergingConfig
from neuromerge_hf.engine.device import find_device
from neuromerge_hf.engine.writer import check_shard_size
from neuromerge_hf.errors import MergeError, Problems
from neuromerge_hf.folder.report import MergeReport
from neuromerge_hf.methods.neuromerging import NeuroMerging
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.planning.planner import plan_found
from neuromerge_hf.planning.preflight import check_output
from neuromerge_hf.planning.resolve import ModelId, find_models
from neuromerge_hf.skeleton import model_class_of
from neuromerge_hf.text import readable_size
from neuromerge_hf.tuning.components import LambdaComponents
from neuromerge_hf.tuning.evaluation import Evaluate, name_of, run_evaluation
from neuromerge_hf.tuning.search import Search, TuningGrid
from neuromerge_hf.tuning.trials import Trial, save_table


@dataclass(frozen=True)
class Tuning:
    """What `tune_lambdas` found.

    Attributes:
        config: the best hyper-parameters, with numbers for the lambdas.
        trials: every candidate with its score, in the order in which they were tried.
        best: the candidate of `config`.
        model: the merged model with these, as transformers loads it.
        report: of the merge that was written, if there is an output directory.
        seconds: wall time; of which `evaluating` seconds were spent in the user's function.
    """

    config: NeuroMergingConfig
    trials: list[Trial]
    best: Trial
    model: PreTrainedModel
    report: MergeReport | None
    seconds: float
    evaluating: float


def tune_lambdas(
    models: Sequence[ModelId],
    evaluate: Evaluate,
    *,
    base_model: ModelId | None = None,
    config: NeuroMergingConfig | None = None,
    grid: TuningGrid | None = None,
    densities: Sequence[float] | None = None,
    metric: str | None = None,
    greater_is_better: bool = True,
    output_dir: str | os.PathLike[str] | None = None,
    tuned_on: str | None = None,
    auto_class: Any = None,
    work_dir: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype = "auto",
    tokenizer: str = "base",
    chat_template: str | None = None,
    merge_heads: bool = False,
    max_shard_size: str | int = "5GB",
    device: str | torch.device | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> Tuning:
    """Find the lambdas, and if wanted the density, with which the merge scores best on validation data.

    The parallel and orthogonal parts are computed once for each density, and each candidate is written into one live
    model in place. The automatic rule is among the candidates, and wins where no other is better. Beside that model,
    nothing but one tensor of each part is held in memory; the parts themselves are files.

    Args:
        models, base_model, dtype, tokenizer, chat_template, merge_heads, max_shard_size, device, threads, overwrite,
            token, trust_remote_code: see `neuromerge_hf.merge`.
        evaluate: called with the merged model, in evaluation mode; returns its score, or a dictionary of scores by
            task, or one of lists of scores by example. Or a dictionary of functions by the names of experts that have
            heads of their own, each called with the merged model under that head. They must leave the weights as they
            are. Use validation data: a score that was tuned on says little about new data.
        config: the density, what is excluded, and the lambdas to start from.
        grid: which lambdas are tried.
        densities: which are tried; only that of `config` by default. Each costs about as much as a merge.
        metric: the entry of the dictionary that counts; by default the mean of all.
        greater_is_better: whether the largest score is the best.
        output_dir: where the merge with the best is written, if wanted, with a table and a picture of all candidates.
        tuned_on: what recipe, report and card call the validation data; the name of the function by default.
        auto_class: an Auto class or a model class of transformers to load the model as; by default the experts' own, or
            the base's where they differ or have heads of their own.
        work_dir: where a temporary folder for the parts is made, three to four times as large as the model in float32;
            beside the output directory, or in the system's temporary folder.
        **kwargs: anything else that `from_pretrained` takes, for the live model.

    Raises:
        MergeError: if the models cannot be merged, or what `evaluate` returns is no score.
    """
    started = time.perf_counter()
    config = config or NeuroMergingConfig()
    if not isinstance(config, NeuroMergingConfig):
        raise MergeError(f"Lambdas are NeuroMerging's: config must be a NeuroMergingConfig, not {config!r}.")
    densities = list(dict.fromkeys(densities or (config.density,)))
    for density in densities:
        dataclasses.replace(config, density=density)  # which checks it
    grid = grid or TuningGrid()
    target = None if output_dir is None else Path(output_dir).expanduser().absolute()
    problems = Problems()
    if target:
        problems.attempt(partial(check_output, target, overwrite))
        problems.attempt(partial(check_shard_size, max_shard_size))
    compute_device = problems.attempt(partial(find_device, device))
    found = find_models(models, base_model, token, problems)
    settings: dict[str, Any] = {
        "dtype": dtype,
        "tokenizer": tokenizer,
        "chat_template": chat_template,
        "merge_heads": merge_heads,
        "threads": threads,
        "trust_remote_code": trust_remote_code,
    }
    plan = plan_found(found, config=config, target=target, **settings)
    if plan.bytes_to_download:
        found.fetch_weights()
        plan = plan_found(found, config=config, target=target, **settings)
    assert compute_device is not None, "else there was a problem"

    kwargs |= {"trust_remote_code": True} if trust_remote_code else {}
    kwargs |= {"token": token} if token is not None else {}

    def load(folder: Path, **options: Any) -> Any:
        return (auto_class or _class_of(plan, folder, trust_remote_code)).from_pretrained(folder, **options)

    folder = _folder_beside(work_dir, target, plan)
    try:
        for expert in plan.experts:
            if expert.preparation:
                (folder / "prepared").mkdir(exist_ok=True)
                expert.preparation.run(folder / "prepared")
            if expert.head:
                expert.head.save(folder / "heads" / expert.name)
        (folder / "parts").mkdir()
        parts = LambdaComponents(plan, folder / "parts", load, compute_device, trust_remote_code)
        search = Search(
            parts, partial(run_evaluation, evaluate, heads=folder / "heads"), metric, greater_is_better, kwargs
        )

        def compute(density: float) -> NeuroMerging:
            at_density = dataclasses.replace(config, density=density)
            fitted = NeuroMerging.fit(at_density, plan, compute_device, plan.threads, lambda _: None)
            parts.compute(fitted)
            return fitted

        for density in densities:
            search.run(density, compute(density), grid)
        best = search.best
        if best.density != density:  # whose parts there are
            compute(best.density)
        parts.put(search.model, best.lambda_parallel, best.lambda_orthogonal)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    chosen = dataclasses.replace(
        config,
        density=best.density,
        lambda_parallel=best.lambda_parallel,
        lambda_orthogonal=best.lambda_orthogonal,
    )
    report = None
    if target:
        report = merge(
            models,
            target,
            base_model=base_model,
            config=chosen,
            tuned_on=tuned_on or name_of(evaluate),
            max_shard_size=max_shard_size,
            device=device,
            overwrite=overwrite,
            token=token,
            **settings,
        )
        save_table(search.trials, best, target, greater_is_better)
    seconds = time.perf_counter() - started
    return Tuning(chosen, search.trials, best, search.model, report, seconds, search.seconds)


def _class_of(plan: MergePlan, folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    loaded = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return model_class_of(loaded, folder, trust_remote_code)


def _folder_beside(work_dir: str | os.PathLike[str] | None, target: Path | None, plan: MergePlan) -> Path:
    """A temporary folder that is large enough for the parts."""
    parent = next(path for path in target.parents if path.exists()) if target else Path(tempfile.gettempdir())
    parent = parent if work_dir is None else Path(work_dir).expanduser()
    entries = sum(unit.entries for unit in plan.units)
    needed = 16 * entries + sum(unit.nbytes for unit in plan.units) + plan.disk_needed
    usage = shutil.disk_usage(parent)
    if usage.free < needed and usage.total > 0:
        raise MergeError(
            f"No space on the disk: {readable_size(needed)} are needed to tune, but only {readable_size(usage.free)} "
            f"are free in {parent}. Free some space, or choose another folder with work_dir."
        )
    return Path(tempfile.mkdtemp(prefix="neuromerge-", dir=parent))
