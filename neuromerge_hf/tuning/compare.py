"""Comparing methods of merging on the user's own tasks."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.tqdm import tqdm
from transformers import AutoConfig

from neuromerge_hf.api import merge
from neuromerge_hf.config import CONFIGS, MergeConfig, TaskArithmeticConfig
from neuromerge_hf.errors import MergeError
from neuromerge_hf.planning.resolve import ModelId
from neuromerge_hf.skeleton import model_class_of
from neuromerge_hf.storage.files import HEADS
from neuromerge_hf.tuning.bootstrap import Interval, differences
from neuromerge_hf.tuning.comparison import Comparison
from neuromerge_hf.tuning.evaluation import Evaluate, Scores, name_of, run_evaluation


def compare_methods(
    models: Sequence[ModelId],
    evaluate: Evaluate,
    *,
    base_model: ModelId | None = None,
    methods: Sequence[MergeConfig] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    auto_class: Any = None,
    work_dir: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype = "auto",
    tokenizer: str = "base",
    chat_template: str | None = None,
    merge_heads: bool = False,
    device: str | torch.device | None = None,
    threads: int | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> Comparison:
    """Merge with each method, and evaluate each merge, the base and every expert.

    All are loaded as the same class, without the experts' own heads: an expert is evaluated as the merge of itself
    alone. A winner is declared only if it is better on average than every other method by more than the noise: a paired
    bootstrap interval over the examples, at 95% for all comparisons together. Without scores by example none is.

    Args:
        models, base_model, dtype, tokenizer, chat_template, merge_heads, device, threads, token, trust_remote_code: see
            `neuromerge_hf.merge`.
        evaluate: called with each model, in evaluation mode; returns its score, or a dictionary of scores by task, or
            one of lists of scores by example, always in the same order. Greater is better. Or a dictionary of functions
            by the names of experts that have heads of their own, each called with every model under that head.
        methods: configurations; by default each method at its customary settings.
        output_dir: where ``comparison.json``, ``.md`` and ``.png`` are written, if wanted.
        auto_class: an Auto class or a model class of transformers to load the models as.
        work_dir: where each merge lies while it is evaluated; by default the system's temporary folder.
        **kwargs: anything else that `from_pretrained` takes.

    Raises:
        MergeError: if the models cannot be merged, or what `evaluate` returns cannot be compared.
    """
    target = None if output_dir is None else Path(output_dir).expanduser()
    if target:
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MergeError(f"The folder {target} cannot be made: {error.strerror}. Choose another one.") from error
    configs = {label_of(config): config for config in methods or [config() for config in CONFIGS.values()]}
    settings: dict[str, Any] = {
        "base_model": base_model,
        "dtype": dtype,
        "tokenizer": tokenizer,
        "chat_template": chat_template,
        "merge_heads": merge_heads,
        "device": device,
        "threads": threads,
        "token": token,
        "trust_remote_code": trust_remote_code,
    }
    kwargs |= {"trust_remote_code": True} if trust_remote_code else {}
    progress = tqdm(total=1 + len(models) + len(configs), desc="Comparing", name="neuromerge_hf.comparison")

    with tempfile.TemporaryDirectory(prefix="neuromerge-", dir=work_dir) as folder, progress:

        def evaluated(merged: Sequence[ModelId], config: MergeConfig) -> tuple[Scores, list[str]]:
            report = merge(merged, Path(folder) / "merged", config=config, overwrite=True, **settings)
            loaded = AutoConfig.from_pretrained(report.output_dir, trust_remote_code=trust_remote_code)
            model_class = auto_class or model_class_of(loaded, report.output_dir, trust_remote_code)
            model = model_class.from_pretrained(report.output_dir, **kwargs).eval()
            if (report.output_dir / HEADS).is_dir() and not heads.is_dir():  # of all experts, the first time
                shutil.copytree(report.output_dir / HEADS, heads)
            with torch.no_grad():
                scores = run_evaluation(evaluate, model, heads)
            progress.update()
            return scores, [expert.name for expert in report.experts]

        heads = Path(folder) / HEADS
        base, names = evaluated(models, TaskArithmeticConfig(scale=0.0))
        alone = TaskArithmeticConfig(scale=1.0)
        experts = {name: evaluated([model], alone)[0] for name, model in zip(names, models, strict=True)}
        merges = {label: evaluated(models, config)[0] for label, config in configs.items()}
    for name, scores in {**experts, **merges}.items():
        _check_same_tasks(evaluate, base, name, scores)
    comparison = Comparison(base, experts, merges, *judge(merges))
    if target:
        comparison.save(target)
    return comparison


def judge(methods: dict[str, Scores]) -> tuple[dict[str, Interval], str | None, str]:
    """By how much the best method leads each other, whether it is the winner, and why or why not."""
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
    return intervals, best, f"{lead}, and wins: its lead over every other method is beyond the noise."


def label_of(config: MergeConfig) -> str:
    """The method with the settings that are not the defaults."""
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
