"""Measures how good merged models are: six text tasks, full fine-tunes and LoRA adapters, three training seeds.

    pip install -e '.[demo]'
    python benchmarks/quality/run.py --cache quality        # from nothing; goes on where it was stopped

Each trained expert, each merge and each score is a file in the cache, and what is there is not made again. Everything
that is chosen is chosen on validation texts; the test texts are read for the final table alone.
"""

import argparse
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from statistics import mean

import torch
from experts import KINDS, SEEDS, expert_folder, train_expert
from huggingface_hub.utils import disable_progress_bars
from methods import METHODS, Setting, add, merged_direction
from safetensors.torch import load_file, save_file
from scoring import Encoder, Scorer, load_base
from summary import write_report, write_validation
from tasks import TASKS, Split, load_splits
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

SIZES = (2, 4, 6)
STEPS = ("train", "validate", "test", "report")
BASE, EXPERTS = Setting("base", None, 0), Setting("experts", None, 1)
REFERENCES = (BASE, EXPERTS)
DEFAULTS = tuple(method.default for method in METHODS.values())


@dataclass(frozen=True)
class Job:
    """One score: of a merge of the first `size` experts of a kind and a seed, on each of their tasks."""

    kind: str
    seed: int
    size: int
    setting: Setting
    split: Split

    def file(self, folder: Path) -> Path:
        return (
            folder / "scores" / self.split / f"{self.kind}-{self.seed}" / f"{self.size}-tasks" / f"{self.setting}.json"
        )


class Bench:
    """Trains, merges and scores, and remembers the scores as files."""

    def __init__(self, folder: Path):
        self.folder = folder

    def train(self, families: Sequence[tuple[int, str]]) -> Iterator[None]:
        for seed, kind in families:
            for task in TASKS:
                folder = expert_folder(self.folder, kind, seed, task)
                if not folder.is_dir():
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    train_expert(load_splits(task, self.folder / "data"), kind, seed, folder)
                yield

    def score(self, job: Job) -> dict[str, float]:
        """The accuracy by task, from its file or measured now."""
        file = job.file(self.folder)
        if not file.is_file():
            scores = self._measure(job)
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps({"job": asdict(job), "accuracy": scores}))
            partial.rename(file)
        return json.loads(file.read_text())["accuracy"]

    def average(self, job: Job) -> float:
        return mean(self.score(job).values())

    def best(self, kind: str, seed: int, size: int, method: str) -> Setting:
        """The setting with the best validation score; the default where none is tried."""
        tried = METHODS[method].tried or (METHODS[method].default,)
        return max(tried, key=lambda setting: self.average(Job(kind, seed, size, setting, "validation")))

    def _measure(self, job: Job) -> dict[str, float]:
        scorer = self._scorer(job.kind, job.seed, job.split)
        tasks = TASKS[: job.size]
        if job.setting == EXPERTS:
            return scorer.score_experts(tasks)
        if job.setting == BASE:
            return scorer.score(self._base(), tasks)
        direction = self._direction(job.kind, job.seed, job.size, job.setting.method, job.setting.density)
        return scorer.score(add(self._base(), direction, job.setting.scale), tasks)

    @cache  # noqa: B019 (one object for the life of the program)
    def _base(self) -> Encoder:
        return load_base()

    @lru_cache(maxsize=1)  # noqa: B019
    def _scorer(self, kind: str, seed: int, split: Split) -> Scorer:
        return Scorer(self._folders(kind, seed, len(TASKS)), self.folder / "data", split, kind)

    @lru_cache(maxsize=1)  # noqa: B019
    def _direction(self, kind: str, seed: int, size: int, method: str, density: float | None) -> Encoder:
        folders = list(self._folders(kind, seed, size).values())
        if size < len(TASKS):  # quicker made than all tasks', and too many to keep
            return merged_direction(folders, Setting(method, density, 1))
        file = self.folder / "directions" / f"{kind}-{seed}" / f"{size}-tasks" / f"{method}-{density}.safetensors"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}")
            save_file(merged_direction(folders, Setting(method, density, 1)), partial)
            partial.rename(file)
        return load_file(file)

    def _folders(self, kind: str, seed: int, size: int) -> dict[str, Path]:
        return {task: expert_folder(self.folder, kind, seed, task) for task in TASKS[:size]}


def all_families() -> list[tuple[int, str]]:
    """Each seed and kind of experts, in the order of the work."""
    return [(seed, kind) for seed in SEEDS for kind in KINDS]


def by_merge(setting: Setting) -> tuple[str, float, float]:
    """The order in which settings that share a merge follow each other."""
    return setting.method, setting.density or 0, setting.scale


def validation_jobs(families: Sequence[tuple[int, str]]) -> list[Job]:
    tried = {setting for method in METHODS.values() for setting in method.tried}
    settings = sorted({*REFERENCES, *DEFAULTS, *tried}, key=by_merge)
    return [
        Job(kind, seed, size, setting, "validation")
        for seed, kind in families
        for size in reversed(SIZES)
        for setting in settings
    ]


def test_jobs(bench: Bench, families: Sequence[tuple[int, str]]) -> list[Job]:
    """The references and every method at its default and tuned, for each number of tasks."""
    jobs = []
    for seed, kind in families:
        for size in reversed(SIZES):
            tuned = [bench.best(kind, seed, size, method) for method in METHODS]
            settings = sorted({*REFERENCES, *DEFAULTS, *tuned}, key=by_merge)
            jobs += [Job(kind, seed, size, setting, "test") for setting in settings]
    return jobs


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="where archives, experts and scores are kept (15 GB)")
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
    if "validate" in options.steps:
        for job in tqdm(validation_jobs(families), "Validating", unit="score"):
            bench.score(job)
        write_validation(bench)
    if "test" in options.steps:
        for job in tqdm(test_jobs(bench, families), "Testing", unit="score"):
            bench.score(job)
    if "report" in options.steps:
        write_report(bench)


if __name__ == "__main__":
    main()
