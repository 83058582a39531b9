"""Open questions of NeuroMerging, answered on the validation texts: an experiment beside the library, not a part of it.

    python benchmarks/quality/variants.py --cache quality      # after run.py has made the archives and the experts

Merges in memory with the kernel's functions and variations of them, the experts of `experts.REGIMES`:
* density, and lambda_2 by the paper's rule or by the length of what is added to the base: 0.7 to 2 times the length of
  an expert's task vector;
* elect "mean" (the paper's) or "weighted": the magnitude-weighted mean of the agreeing coordinates; and, to compare
  with, the plain average of the task vectors, at its own length and longer;
* embeddings, or parameters that are not neuronal, left at the base; lambda_1 above 0;
* two and four experts instead of six.
"""

import argparse
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from unittest.mock import patch

import torch
from experts import KINDS, REGIMES, SEEDS, expert_folder, train_expert
from scoring import Encoder, Scorer, encoder_of, load_base, load_expert
from tasks import TASKS, load_splits
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar, set_verbosity_error
from variants_table import write_report

from neuromerge_hf import kernel

ROWS = 2048
EMBEDDINGS = "embeddings."
AVERAGE = "average"
DENSITIES = (0.1, 0.2, 0.5, 1.0)
LENGTHS = (0.7, 1.0, 1.4, 2.0)
SETS = {len(TASKS): (TASKS,), 4: (TASKS[:4], TASKS[2:]), 2: (TASKS[:2], TASKS[2:4], TASKS[4:])}


def elect_weighted(x: Tensor, dim: int, tie_sign: Tensor | None = None, rounding: float = 0.0) -> Tensor:
    """As `kernel.elect_mean`, with the mean of the agreeing entries weighted by their magnitudes."""
    sign = kernel.elected_sign(x, dim, rounding)
    if tie_sign is not None:
        sign = torch.where(sign == 0, tie_sign, sign)
    agreeing = (x * sign).clamp_(min=0)
    total = agreeing.sum(dim)
    return sign.squeeze(dim) * torch.where(total > 0, agreeing.square().sum(dim) / total, 0.0)


ELECTS = {"mean": kernel.elect_mean, "weighted": elect_weighted}


class TaskVectors:
    """The task vectors of some experts, in memory, with the trim thresholds of any density."""

    def __init__(self, base: Encoder, folders: Sequence[Path]):
        experts = [encoder_of(load_expert(folder)) for folder in folders]
        self.base = base
        self.changes = {
            name: torch.stack([expert[name] - weight for expert in experts]) for name, weight in base.items()
        }
        # An adapter's task vector consists of the parameters that it targets.
        self.changes = {name: change for name, change in self.changes.items() if change.any()}
        flat = (torch.cat([change[t].abs().flatten() for change in self.changes.values()]) for t in range(len(folders)))
        self.sorted = [magnitudes.sort().values for magnitudes in flat]
        self.norms = [magnitudes.double().square().sum().sqrt().item() for magnitudes in self.sorted]

    def trimming(self, density: float) -> tuple[list[float], float]:
        """The threshold of each expert, and the largest sigma."""
        thresholds, sigmas = [], [0.0]
        for magnitudes in self.sorted:
            rank = int((1 - density) * len(magnitudes) + 1e-9)
            thresholds.append(magnitudes[rank - 1].item() if rank else 0.0)
            kept = magnitudes >= thresholds[-1]
            sigmas.append(1 - (magnitudes[kept].double().sum() / magnitudes.double().sum()).item())
        return thresholds, max(sigmas)

    def direction(self, density: float, elect: str, parallel: float = 0.0) -> Encoder:
        """What NeuroMerging adds to the base at lambda_2 = 1 and lambda_1 = `parallel`."""
        if elect == AVERAGE:
            return {name: change.mean(0) for name, change in self.changes.items()}
        thresholds, _ = self.trimming(density)
        merged = {}
        with patch.object(kernel, "elect_mean", ELECTS[elect]):
            for name, change in self.changes.items():
                trimmed = torch.stack([kernel.trim(tau, low) for tau, low in zip(change, thresholds, strict=True)])
                if trimmed.dim() == 2:
                    zeros = torch.zeros_like(self.base[name])
                    merged[name] = kernel.merge_elementwise(zeros, trimmed, 1.0)
                else:
                    x = torch.cat([self.base[name].unsqueeze(0), trimmed]).transpose(0, 1)
                    merged[name] = torch.cat([kernel.neuron_change(rows, parallel, 1.0) for rows in x.split(ROWS)])
        return merged

    def length(self, direction: Encoder) -> float:
        """The Euclidean norm of a whole direction, in mean norms of the task vectors."""
        norm = sum(change.double().square().sum().item() for change in direction.values()) ** 0.5
        return norm / mean(self.norms)

    def kept(self, direction: Encoder) -> float:
        """The share of a task vector that a direction holds, their inner product over its square: the experts' mean."""
        products = (
            sum((change.double() * self.changes[name][t].double()).sum().item() for name, change in direction.items())
            for t in range(len(self.norms))
        )
        return mean(product / norm**2 for product, norm in zip(products, self.norms, strict=True))


@dataclass(frozen=True)
class Variant:
    """One merge.

    Attributes:
        rule: what lambda_2 is: "automatic", or how many lengths of a task vector long the merged one is.
        left: what stays at the base: "", "1d" or "embeddings".
        parallel: lambda_1, as a share of lambda_2.
    """

    density: float
    elect: str
    rule: str
    left: str = ""
    parallel: float = 0.0


def applied(base: Encoder, direction: Encoder, scale: float, left: str) -> Encoder:
    """The base and `scale` times the direction, where it is not left as it is."""

    def stays(name: str, weight: Tensor) -> bool:
        return (
            name not in direction
            or (left == "1d" and weight.dim() < 2)
            or (left == "embeddings" and name.startswith(EMBEDDINGS) and weight.dim() == 2)
        )

    return {name: weight if stays(name, weight) else weight + scale * direction[name] for name, weight in base.items()}


class Experiment:
    """Scores variants of one family of experts, and keeps the scores in a file."""

    def __init__(self, cache: Path, kind: str, seed: int, tasks: Sequence[str] = TASKS):
        self.folders = {task: expert_folder(cache, kind, seed, task) for task in tasks}
        self.base = load_base()
        self.vectors = TaskVectors(self.base, list(self.folders.values()))
        self.scorer = Scorer(self.folders, cache / "data", "validation", kind)
        self.file = variants_file(cache, kind, seed, tasks)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        self.done = {Variant(**json.loads(line)["variant"]) for line in lines}
        self._directions: dict[tuple[float, str, float], tuple[Encoder, float, float]] = {}

    def score(self, variant: Variant) -> None:
        """Measure a variant, if it has not been."""
        if variant in self.done:
            return
        direction, length, kept = self._direction(variant.density, variant.elect, variant.parallel)
        sigma = self.vectors.trimming(variant.density)[1]
        scale = 1 / (1 - sigma) if variant.rule == "automatic" else float(variant.rule) / length
        accuracy = self.scorer.score(applied(self.base, direction, scale, variant.left))
        row = {"variant": asdict(variant), "accuracy": accuracy, "lambda": scale}
        row |= {"length": scale * length, "kept": scale * kept}
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _direction(self, density: float, elect: str, parallel: float) -> tuple[Encoder, float, float]:
        key = density, elect, parallel
        if key not in self._directions:
            direction = self.vectors.direction(*key)
            self._directions = {key: (direction, self.vectors.length(direction), self.vectors.kept(direction))}
        return self._directions[key]


def variants_file(cache: Path, kind: str, seed: int, tasks: Sequence[str]) -> Path:
    return cache / "variants" / f"{kind}-{seed}" / f"{'-'.join(tasks)}.jsonl"


def variants(tasks: Sequence[str], kind: str) -> list[Variant]:
    """What is tried, merges that share a direction in a row."""
    rules = ("automatic", *map(str, LENGTHS))
    if len(tasks) < len(TASKS):
        return [Variant(density, "mean", rule) for density in (0.2, 1.0) for rule in rules]
    found = [Variant(1.0, AVERAGE, rule) for rule in ("automatic", "1.0", "1.4")]
    found += [Variant(density, "mean", rule) for density in DENSITIES for rule in rules]
    found += [Variant(0.2, "weighted", rule) for rule in rules]
    if kind != "lora":  # these adapters target neither
        found += [Variant(0.2, "mean", "automatic", left) for left in ("1d", "embeddings")]
    return found + [Variant(0.2, "mean", "automatic", parallel=share) for share in (0.5, 1.0)]


def train_missing(cache: Path, kind: str, seed: int) -> None:
    for task in TASKS:
        folder = expert_folder(cache, kind, seed, task)
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            train_expert(load_splits(task, cache / "data"), kind, seed, folder)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", choices=REGIMES, default=REGIMES)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--sizes", nargs="+", type=int, choices=SETS, default=[*SETS])
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    disable_progress_bar()
    set_verbosity_error()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # peft calls transformers by an old name
    work = [
        (kind, seed, tasks)
        for seed in options.seeds
        for kind in options.kinds
        for size in options.sizes
        if size == len(TASKS) or kind in KINDS
        for tasks in SETS[size]
    ]
    for kind, seed, tasks in tqdm(work, "Sets of experts"):
        train_missing(options.cache, kind, seed)
        experiment = Experiment(options.cache, kind, seed, tasks)
        for variant in variants(tasks, kind):
            experiment.score(variant)
    write_report(options.cache)


if __name__ == "__main__":
    main()
