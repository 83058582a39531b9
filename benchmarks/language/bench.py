"""Merges experts of the language model and scores the merges. Each result is kept in a file, not computed again."""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean

from experts import expert_folder
from safetensors.torch import load_file
from scoring import Scorer
from skills import SKILLS, Split
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "quality"))

from methods import METHODS, Setting

from neuromerge_hf import merge

BASE, EXPERTS = Setting("base", None, 0), Setting("experts", None, 1)
"""The references of the merges: the base, and each expert on its own skill."""

State = dict[str, Tensor]


@dataclass(frozen=True)
class Job:
    """One score to compute: a merge of the first `size` experts of a kind and a seed, on each of their skills."""

    kind: str
    seed: int
    size: int
    setting: Setting
    split: Split

    def file(self, folder: Path) -> Path:
        """Return the file that keeps the score."""
        return folder / "scores" / self.split / f"{self.kind}-{self.seed}-{self.size}-{self.setting}.json"


@dataclass(frozen=True)
class Result:
    """A score.

    Attributes:
        right: for each skill, a "1" for each prompt that is answered exactly right and a "0" for each other one.
        loss: for each skill, the mean loss of an answer's tokens.
        perplexity: that of the neutral text; a mean over the experts for `EXPERTS`.
    """

    right: dict[str, str]
    loss: dict[str, float]
    perplexity: float

    @property
    def average(self) -> float:
        """The share of the right answers, on average over the skills."""
        return mean(bits.count("1") / len(bits) for bits in self.right.values())


class Bench:
    """Merges and scores, and keeps the results as files in a folder with the base and the experts."""

    def __init__(self, folder: Path):
        self.folder = folder

    def score(self, job: Job) -> Result:
        """Return a score. Measure it if its file is missing."""
        file = job.file(self.folder)
        if not file.is_file():
            result = self._measure(job)
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(asdict(result)))
            partial.rename(file)
        return Result(**json.loads(file.read_text()))

    def _measure(self, job: Job) -> Result:
        skills = list(SKILLS)[: job.size]
        if job.setting == EXPERTS:
            own = {skill: self._scored([skill], self._expert(job, skill), job.split) for skill in skills}
            return Result(
                {skill: result.right[skill] for skill, result in own.items()},
                {skill: result.loss[skill] for skill, result in own.items()},
                mean(result.perplexity for result in own.values()),
            )
        if job.setting == BASE:
            return self._scored(skills, {}, job.split)
        base = load_file(self.folder / "base" / "model.safetensors")
        direction = self._direction(job.kind, job.seed, job.size, job.setting.method, job.setting.density)
        merged = {name: base[name] + job.setting.scale * change for name, change in direction.items()}
        return self._scored(skills, merged, job.split)

    def _scored(self, skills: Sequence[str], state: State, split: Split) -> Result:
        scorer = self._scorer(split)
        scores = scorer.score(state, skills)
        return Result(
            {skill: "".join(str(int(hit)) for hit in score.right) for skill, score in scores.items()},
            {skill: mean(score.loss) for skill, score in scores.items()},
            scorer.perplexity(state),
        )

    def _expert(self, job: Job, skill: str) -> State:
        """The weights of an expert, as a merge of it alone gives them back."""
        change = self._merged(
            [expert_folder(self.folder, job.kind, job.seed, skill)], Setting("task_arithmetic", None, 1)
        )
        base = load_file(self.folder / "base" / "model.safetensors")
        return {name: base[name] + each for name, each in change.items()}

    @lru_cache(maxsize=1)  # noqa: B019 (one object for the life of the program)
    def _scorer(self, split: Split) -> Scorer:
        return Scorer(self.folder, list(SKILLS), split)

    @lru_cache(maxsize=1)  # noqa: B019
    def _direction(self, kind: str, seed: int, size: int, method: str, density: float | None) -> State:
        folders = [expert_folder(self.folder, kind, seed, skill) for skill in list(SKILLS)[:size]]
        return self._merged(folders, Setting(method, density, 1))

    def _merged(self, folders: Sequence[Path], setting: Setting) -> State:
        """Return what a method adds to the base at scale 1, without the parameters that it leaves unchanged."""
        config = METHODS[setting.method].config(setting.density or 1)
        with tempfile.TemporaryDirectory() as temporary:
            output = Path(temporary, "merged")
            merge(list(folders), output, base_model=self.folder / "base", config=config, dtype="float32", threads=1)
            merged = load_file(output / "model.safetensors")
        base = load_file(self.folder / "base" / "model.safetensors")
        changes = {name: tensor - base[name] for name, tensor in merged.items()}
        return {name: change for name, change in changes.items() if change.any()}
