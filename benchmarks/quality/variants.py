"""Open questions of NeuroMerging, answered on the validation texts: an experiment beside the library, not a part of it.

    python benchmarks/quality/variants.py --cache quality      # after run.py has trained the experts

Merges in memory with the kernel's functions and variations of them:
* density, and lambda_2 from a half to twice the length of an expert's task vector;
* elect "mean" (the paper's) or "weighted": the magnitude-weighted mean of the agreeing coordinates;
* embeddings merged or left at the base; parameters that are not neuronal merged or left at the base.
"""

import argparse
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch
from experts import KINDS, SEEDS, expert_folder
from scoring import Encoder, Scorer, encoder_of, load_base, load_expert
from summary import RESULTS, table
from tasks import TASKS
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from neuromerge_hf import kernel

ROWS = 2048
EMBEDDINGS = "embeddings."


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

    def direction(self, density: float, elect: str) -> Encoder:
        """What NeuroMerging adds to the base at lambda_1 = 0 and lambda_2 = 1."""
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
                    blocks = [kernel.merge_neurons(rows, 0.0, 1.0) for rows in x.split(ROWS)]
                    merged[name] = torch.cat(blocks) - self.base[name]
        return merged


@dataclass(frozen=True)
class Variant:
    """One merge: lambda_2 is `scale`; `left` names what stays at the base: "", "1d" or "embeddings"."""

    density: float
    elect: str
    scale: float
    left: str = ""

    def applied(self, base: Encoder, direction: Encoder) -> Encoder:
        def stays(name: str, weight: Tensor) -> bool:
            return (
                name not in direction
                or (self.left == "1d" and weight.dim() < 2)
                or (self.left == "embeddings" and name.startswith(EMBEDDINGS) and weight.dim() == 2)
            )

        return {
            name: weight if stays(name, weight) else weight + self.scale * direction[name]
            for name, weight in base.items()
        }


def length(direction: Encoder) -> float:
    """The Euclidean norm of a whole direction."""
    return sum(change.double().square().sum().item() for change in direction.values()) ** 0.5


class Experiment:
    """Scores variants of one family of experts, and keeps the scores in a file."""

    def __init__(self, cache: Path, kind: str, seed: int):
        self.folders = {task: expert_folder(cache, kind, seed, task) for task in TASKS}
        self.base = load_base()
        self.vectors = TaskVectors(self.base, list(self.folders.values()))
        self.scorer = Scorer(self.folders, cache / "data", "validation")
        self.file = cache / "variants" / f"{kind}-{seed}.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        self.done = {json.dumps(json.loads(line)["variant"]) for line in lines}
        self.directions: dict[tuple[float, str], Encoder] = {}

    def direction(self, density: float, elect: str) -> Encoder:
        if (density, elect) not in self.directions:
            self.directions = {(density, elect): self.vectors.direction(density, elect)}
        return self.directions[density, elect]

    def score(self, variant: Variant) -> None:
        if json.dumps(asdict(variant)) in self.done:
            return
        direction = self.direction(variant.density, variant.elect)
        accuracy = self.scorer.score(variant.applied(self.base, direction))
        row = {
            "variant": asdict(variant),
            "accuracy": accuracy,
            "sigma": self.vectors.trimming(variant.density)[1],
            "length": length(direction) / (sum(self.vectors.norms) / len(self.vectors.norms)),
        }
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")


DENSITIES = (0.2, 0.5)
SCALES = (0.7, 1.0, 1.4)


def explore(experiment: Experiment, densities: Sequence[float]) -> None:
    """Score both elections at some densities and scales, and what is left at the base under the paper's."""
    # The adapters here target neither.
    leaving = ("1d", "embeddings") if any(change.dim() == 2 for change in experiment.vectors.changes.values()) else ()
    mean_norm = sum(experiment.vectors.norms) / len(experiment.vectors.norms)
    for density in densities:
        automatic = round(1 / (1 - experiment.vectors.trimming(density)[1]), 4)
        for elect in ELECTS:
            matched = round(mean_norm / length(experiment.direction(density, elect)), 4)
            for scale in (*SCALES, matched):
                experiment.score(Variant(density, elect, scale))
            if elect == "mean":
                for left in ("", *leaving):
                    experiment.score(Variant(density, elect, automatic, left))
    for left in leaving:
        experiment.score(Variant(densities[0], "mean", 1.0, left))


def rule_of(row: dict[str, Any]) -> str:
    """What the lambda_2 of a row is: a constant, the paper's rule, or the one that gives an expert's length."""
    scale = row["variant"]["scale"]
    if scale == round(1 / row["length"], 4):
        return "matched"
    if scale == round(1 / (1 - row["sigma"]), 4):
        return "automatic"
    return f"{scale:g}"


def write_report(cache: Path) -> None:
    """results/variants.md: average validation accuracy in % of every variant, for each family of experts."""
    families = [f"{kind}-{seed}" for kind in KINDS for seed in SEEDS]
    found: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    lengths: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for family in families:
        file = cache / "variants" / f"{family}.jsonl"
        for row in map(json.loads, file.read_text().splitlines() if file.is_file() else []):
            variant = row["variant"]
            density, elect = f"{variant['density']:g}", variant["elect"]
            found[density, elect, variant["left"], rule_of(row)][family] = 100 * mean(row["accuracy"].values())
            lengths[density, elect, "automatic"][family] = 1 / (1 - row["sigma"])
            lengths[density, elect, "matched"][family] = 1 / row["length"]
    titles = ["density", "elect", "left at the base", "lambda_2"]
    rows = [[*titles, *families, *(f"{kind}, mean" for kind in KINDS)]]
    for key, scores in sorted(found.items()):
        rows.append([*key, *_cells(scores, families, ".1f")])
    lines = ["Average validation accuracy in %, six tasks.\n", *table(rows)]
    rows = [["density", "elect", "rule", *families, *(f"{kind}, mean" for kind in KINDS)]]
    rows += [[*key, *_cells(values, families, ".2f")] for key, values in sorted(lengths.items())]
    lines += ["\nThe lambda_2 of both rules.\n", *table(rows)]
    (RESULTS / "variants.md").write_text("\n".join(lines) + "\n")


def _cells(values: dict[str, float], families: Sequence[str], form: str) -> list[str]:
    cells = [format(values[family], form) if family in values else "" for family in families]
    for kind in KINDS:
        seeds = [values[f"{kind}-{seed}"] for seed in SEEDS if f"{kind}-{seed}" in values]
        cells.append(format(mean(seeds), form) if seeds else "")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--densities", nargs="+", type=float, default=DENSITIES)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    disable_progress_bar()
    set_verbosity_error()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # peft calls transformers by an old name
    for seed in tqdm(options.seeds, "Seeds"):
        for kind in options.kinds:
            explore(Experiment(options.cache, kind, seed), options.densities)
    write_report(options.cache)


if __name__ == "__main__":
    main()
