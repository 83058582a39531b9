"""Trains experts, merges them and scores the merges. Each result is kept in a file and is not computed again."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from statistics import mean

from experts import expert_folder, train_expert
from merging import add, merged_direction
from methods import METHODS, Setting
from safetensors.torch import load_file, save_file
from scoring import Answers, Encoder, Scorer, load_base
from tasks import TASKS, Split, load_splits

BASE, EXPERTS = Setting("base", None, 0), Setting("experts", None, 1)
"""The references of the merges: the base, and each expert on its own task."""


@dataclass(frozen=True)
class Job:
    """One score to compute: a merge of the first `size` experts of a kind and a seed, on each of their tasks."""

    kind: str
    seed: int
    size: int
    setting: Setting
    split: Split

    def file(self, folder: Path) -> Path:
        """Return the file that keeps the score."""
        family = f"{self.kind}-{self.seed}"
        return folder / "scores" / self.split / family / f"{self.size}-tasks" / f"{self.setting}.json"


class Bench:
    """Trains, merges and scores, and keeps the results as files in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def train(self, families: Sequence[tuple[int, str]]) -> Iterator[None]:
        """Train the experts of families (seed, kind) that are missing, and yield after each expert."""
        for seed, kind in families:
            for task in TASKS:
                folder = expert_folder(self.folder, kind, seed, task)
                if not folder.is_dir():
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    train_expert(load_splits(task, self.folder / "data"), kind, seed, folder)
                yield

    def score(self, job: Job) -> dict[str, float]:
        """Return the accuracy by task. Measure it if its file is missing."""
        return {task: right.count("1") / len(right) for task, right in self.answers(job).items()}

    def answers(self, job: Job) -> Answers:
        """Return which texts are told right, by task. Measure it if its file is missing."""
        file = job.file(self.folder)
        if not file.is_file():
            answers = self._measure(job)
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps({"job": asdict(job), "right": answers}))
            partial.rename(file)
        return json.loads(file.read_text())["right"]

    def average(self, job: Job) -> float:
        return mean(self.score(job).values())

    def best(self, kind: str, seed: int, size: int, method: str) -> Setting:
        """Return the setting with the best validation score, or the default if the method is not tuned."""
        tried = METHODS[method].tried or (METHODS[method].default,)
        return max(tried, key=lambda setting: self.average(Job(kind, seed, size, setting, "validation")))

    def _measure(self, job: Job) -> Answers:
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
        if size < len(TASKS):  # merges of fewer experts are fast, and too many to keep
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
