"""Measures the accuracy of merged models: six text tasks, four kinds of experts, three training seeds.

    pip install -e '.[demo]'
    python benchmarks/quality/run.py --cache quality        # resumes a run that was stopped

Each trained expert, merge and score is a file in the cache, and is not computed again. All choices are made on the
validation texts. The test texts are used for the final tables only.
"""

import argparse
import os
import warnings
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from bench import BASE, EXPERTS, Bench, Job
from experts import KINDS, SEEDS
from figures import FIGURES, RESULTS, VALIDATION, Scores, write_compressed
from huggingface_hub.utils import disable_progress_bars
from intervals import difference
from methods import METHODS, OURS, Setting
from scoring import Answers
from summary import write_summary
from tasks import TASKS
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

SIZES = (2, 4, 6)
TUNED_SIZE = max(SIZES)
"""The number of tasks for which methods are tuned. Tuning takes most of the time."""

STEPS = ("train", "test", "validate", "tuned", "report")
REFERENCES = (BASE, EXPERTS)
DEFAULTS = tuple(method.default for method in METHODS.values())


def all_families() -> list[tuple[int, str]]:
    """Return the seed and the kind of every family of experts, in the order of the work."""
    return [(seed, kind) for seed in SEEDS for kind in KINDS]


def by_merge(setting: Setting) -> tuple[str, float, float]:
    """Return a sort key that puts settings with the same merge next to each other."""
    return setting.method, setting.density or 0, setting.scale


def validation_jobs(families: Sequence[tuple[int, str]]) -> list[Job]:
    """Return jobs for the references and all settings."""
    tried = {setting for method in METHODS.values() for setting in method.tried}
    settings = sorted({*REFERENCES, *DEFAULTS, *tried}, key=by_merge)
    return [Job(kind, seed, TUNED_SIZE, setting, "validation") for seed, kind in families for setting in settings]


def test_jobs(families: Sequence[tuple[int, str]]) -> list[Job]:
    """Return jobs for the references and every method at its default, for each number of tasks."""
    settings = sorted({*REFERENCES, *DEFAULTS}, key=by_merge)
    return [
        Job(kind, seed, size, setting, "test")
        for seed, kind in families
        for size in reversed(SIZES)
        for setting in settings
    ]


def tuned_jobs(bench: Bench, families: Sequence[tuple[int, str]]) -> list[Job]:
    """Return jobs for every method with the setting that is best on the validation texts."""
    return [
        Job(kind, seed, TUNED_SIZE, bench.best(kind, seed, TUNED_SIZE, name), "test")
        for seed, kind in families
        for name, method in METHODS.items()
        if method.tried
    ]


def write_validation(bench: Bench, path: Path) -> None:
    """Write the validation accuracies in % that have been measured."""
    rows = [
        {"experts": job.kind, "seed": job.seed, "tasks": job.size, "setting": str(job.setting)}
        | {task: round(100 * accuracy, 2) for task, accuracy in bench.score(job).items()}
        for job in validation_jobs(all_families())
        if job.file(bench.folder).is_file()
    ]
    write_compressed(path, rows)


def collect_scores(bench: Bench) -> Scores:
    """Return the test accuracies that have been measured."""
    found = Scores()
    answers: dict[tuple[str, int, str], list[Answers]] = defaultdict(list)
    for kind, seed, size in product(KINDS, SEEDS, SIZES):
        settings = {"base": BASE, "experts": EXPERTS} | {name: method.default for name, method in METHODS.items()}
        for name, method in METHODS.items():
            tried = (Job(kind, seed, size, setting, "validation") for setting in method.tried)
            if method.tried and all(job.file(bench.folder).is_file() for job in tried):
                found.chosen[kind, seed, size, name] = bench.best(kind, seed, size, name)
                settings[f"{name} tuned"] = found.chosen[kind, seed, size, name]
        for name, setting in settings.items():
            job = Job(kind, seed, size, setting, "test")
            if job.file(bench.folder).is_file():
                found.by_task[kind, seed, size, name] = {task: 100 * value for task, value in bench.score(job).items()}
                answers[kind, size, name].append(bench.answers(job))
    for (kind, size, name), seeds in answers.items():
        ours, other = (
            {task: [each[task] for each in every] for task in TASKS[:size]}
            for every in (answers[kind, size, OURS], seeds)
        )
        found.differences[kind, size, name] = difference(ours, other)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="where archives, experts and scores are kept (25 GB)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where figures, tables and picture are written")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, metavar="STEP", help=", ".join(STEPS))
    names = [f"{kind}-{seed}" for seed, kind in all_families()]
    parser.add_argument(
        "--families", nargs="+", choices=names, default=names, metavar="FAMILY",
        help="to share the work among processes, before one that makes the report: " + ", ".join(names),
    )  # fmt: skip
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    disable_progress_bar()
    disable_progress_bars()
    set_verbosity_error()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # peft calls transformers by an old name
    bench = Bench(options.cache)
    families = [(seed, kind) for seed, kind in all_families() if f"{kind}-{seed}" in options.families]
    if "train" in options.steps:
        for _ in tqdm(bench.train(families), "Training", total=len(families) * len(TASKS), unit="expert"):
            pass
    if "test" in options.steps:
        for job in tqdm(test_jobs(families), "Testing", unit="score"):
            bench.score(job)
    if "validate" in options.steps:
        for job in tqdm(validation_jobs(families), "Validating", unit="score"):
            bench.score(job)
        write_validation(bench, options.results / VALIDATION)
    if "tuned" in options.steps:
        for job in tqdm(tuned_jobs(bench, families), "Testing tuned settings", unit="score"):
            bench.score(job)
    if "report" in options.steps:
        collect_scores(bench).save(options.results / FIGURES)
        write_summary(options.results)


if __name__ == "__main__":
    main()
