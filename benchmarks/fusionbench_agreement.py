"""Compares Iso-C and TSV-M with FusionBench's on the same models: the changes that they make to linear weights.

    python benchmarks/fusionbench_agreement.py --folder small-models

Both are also compared with the definitions, written out in float64 below. The experts are three full fine-tunes that
change every direction of a weight, and three that change few of them, as merged LoRA adapters do. These differences
remain, and are choices:

* FusionBench flattens all singular values of Iso-C's sum, which is the published method. neuromerge flattens those
  above a thousandth of the largest. The others belong to directions that no task changes, which an SVD chooses
  arbitrarily. With experts that change every direction, both are the same.
* In TSV-M every task gives floor(min(rows, columns) / tasks) triples. FusionBench counts those with a singular value of
  0, too, whose arbitrary vectors turn the others when all are made orthogonal. neuromerge leaves them out.
* FusionBench merges every tensor with two dimensions that way, embeddings and heads too, unless its keys are excluded.
  neuromerge merges the weights of linear layers that way, also those in batches of three dimensions. Here FusionBench
  excludes the embeddings and the head.
* What is left gets the mean of the task vectors, times the scale, from both.
"""

import argparse
import subprocess
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path

import torch
from common import RESULTS, print_table, weights, write_json
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from neuromerge_hf import IsoCConfig, TSVConfig, merge
from neuromerge_hf.config import MergeConfig

FUSIONBENCH = "0.2.33"
EXPERTS, WIDTH, INNER, RANK = 3, 96, 160, 8
NOT_LINEAR = ("model.embed_tokens.weight", "lm_head.weight")
NUMERICAL_RANK, NEGLIGIBLE, GRID = 1e-3, 1e-6, 2.0**-16

State = dict[str, Tensor]

THEIRS = """
import sys
from safetensors.torch import load_file, save_file
from fusion_bench.method.isotropic_merging.iso_utils import iso_c
from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction as tsv

method, excluded, target, base, *experts = sys.argv[1:]
base = load_file(base)
task_vectors = [{name: tensor - base[name] for name, tensor in load_file(expert).items()} for expert in experts]
merged = {"iso_c": iso_c, "tsv": tsv}[method](task_vectors, accelerator="cpu", exclude_keys=excluded.split(","))
save_file({name: tensor.contiguous() for name, tensor in merged.items()}, target)
"""
"""What runs in FusionBench's environment. It saves the merged task vector."""


def environment(folder: Path) -> Path:
    """Make a virtual environment with FusionBench if it is missing, and return its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"Installing FusionBench {FUSIONBENCH} into {folder}", flush=True)
        venv.create(folder, with_pip=True)
        for package in (f"torch=={torch.__version__.split('+')[0]}", f"fusion-bench=={FUSIONBENCH}"):
            subprocess.run([python, "-m", "pip", "install", "-q", package], check=True)
    return python


def make_models(folder: Path, rank: int | None) -> list[Path]:
    """Write a small base and its experts in float32. Their changes of a matrix have a rank, or are of full rank.

    Changes with a rank are sums of small powers of 2, and so is the base, so that float32 does not round them.
    """
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=4)
    config.vocab_size, config.dtype = 300, torch.float32
    model = LlamaForCausalLM(config)
    before = {name: (tensor / GRID).round() * GRID for name, tensor in model.state_dict().items()}
    folders = [folder / "base", *(folder / f"expert-{number}" for number in range(1, EXPERTS + 1))]
    for number, target in enumerate(folders):
        for name, tensor in model.state_dict().items():
            change = 1e-3 * torch.randn(tensor.shape)
            if rank and tensor.dim() == 2:
                change = 8 * GRID * torch.randn(len(tensor), rank).sign() @ torch.randn(rank, tensor.shape[1]).sign()
            tensor.copy_(before[name] + (change if number else 0))
        model.save_pretrained(target)
    return folders


def theirs(python: Path, models: list[Path], folder: Path, method: str) -> State:
    """Return the merged task vector of FusionBench."""
    arguments = [method, ",".join(NOT_LINEAR), folder / "theirs.safetensors", *map(weights, models)]
    subprocess.run([python, "-c", THEIRS, *map(str, arguments)], check=True, capture_output=True)
    return load_file(folder / "theirs.safetensors")


def ours(models: list[Path], folder: Path, config: MergeConfig) -> State:
    """Return the change that neuromerge makes to the base."""
    base, *experts = models
    merge(experts, folder / "ours", base_model=base, config=config, device="cpu", overwrite=True)
    before = load_file(weights(base))
    return {name: tensor - before[name] for name, tensor in load_file(weights(folder / "ours")).items()}


def iso_c(tasks: list[Tensor], cutoff: float) -> Tensor:
    """The sum of the tasks, with the mean of its singular values above `cutoff` of the largest in place of each."""
    u, s, vh = torch.linalg.svd(torch.stack(tasks).sum(0), full_matrices=False)
    kept = s > cutoff * s[0]
    return s[kept].mean() * u[:, kept] @ vh[kept]


def tsv(tasks: list[Tensor], cutoff: float) -> Tensor:
    """The tasks' largest triples, with the nearest orthonormal vectors in place of their singular vectors.

    Triples with a singular value up to `cutoff` of the task's largest do not count.
    """
    count = min(tasks[0].shape) // len(tasks)
    triples = [torch.linalg.svd(task, full_matrices=False) for task in tasks]
    kept = [(s > cutoff * s[0]) & (torch.arange(len(s)) < count) for _, s, _ in triples]
    left = torch.cat([u[:, keep] for (u, _, _), keep in zip(triples, kept, strict=True)], 1)
    values = torch.cat([s[keep] for (_, s, _), keep in zip(triples, kept, strict=True)])
    right = torch.cat([vh[keep] for (_, _, vh), keep in zip(triples, kept, strict=True)])
    return nearest_orthonormal(left) * values @ nearest_orthonormal(right)


def nearest_orthonormal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, on the range of the matrix."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = s > 1e-6 * s[0]
    return u[:, kept] @ vh[kept]


def defined(models: list[Path], merged: Callable[[list[Tensor]], Tensor]) -> State:
    """Return the merged task vector in float64: `merged` of the linear weights, and the mean of everything else."""
    base, *experts = (load_file(weights(model)) for model in models)
    found = {}
    for name, theta in base.items():
        tasks = [(expert[name] - theta).double() for expert in experts]
        is_linear = theta.dim() == 2 and name not in NOT_LINEAR
        found[name] = merged(tasks) if is_linear else torch.stack(tasks).mean(0)
    return found


def distance(one: State, other: State, *, linear: bool) -> float:
    """Return the distance of two changes, relative to the other one, over linear weights or over everything else."""
    names = [name for name in other if (other[name].dim() == 2 and name not in NOT_LINEAR) == linear]
    apart = torch.cat([(one[name].double() - other[name].double()).flatten() for name in names])
    return float(apart.norm() / torch.cat([other[name].double().flatten() for name in names]).norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("small-models"), help="the models and the environment")
    parser.add_argument("--venv", type=Path, help="FusionBench's environment, made if missing (FOLDER/venv)")
    parser.add_argument("--json", type=Path, default=RESULTS / "fusionbench_agreement.json")
    options = parser.parse_args()
    folder = options.folder.absolute()
    python = environment((options.venv or folder / "venv").absolute())

    references: dict[str, tuple[MergeConfig, Callable[[list[Tensor]], Tensor], Callable[[list[Tensor]], Tensor]]] = {
        "iso_c": (IsoCConfig(), lambda tasks: iso_c(tasks, NUMERICAL_RANK), lambda tasks: iso_c(tasks, 0)),
        "tsv": (TSVConfig(), lambda tasks: tsv(tasks, NEGLIGIBLE), lambda tasks: tsv(tasks, 0)),
    }
    found, rows = {}, []
    for kind, rank in (("full rank", None), (f"rank {RANK}", RANK)):
        models = make_models(folder / kind.replace(" ", "-"), rank)
        for method, (config, own_definition, their_definition) in references.items():
            with tempfile.TemporaryDirectory() as temporary:
                own, other = ours(models, Path(temporary), config), theirs(python, models, Path(temporary), method)
            measured = {
                "ours to theirs": distance(own, other, linear=True),
                "ours to its definition": distance(own, defined(models, own_definition), linear=True),
                "theirs to its definition": distance(other, defined(models, their_definition), linear=True),
                "everything else, ours to theirs": distance(own, other, linear=False),
            }
            found[f"{method}, {kind}"] = measured
            rows.append([method, kind, *(f"{value:.1e}" for value in measured.values())])
    print(f"\n{EXPERTS} experts; relative distances of the changes, ours and FusionBench {FUSIONBENCH}:\n")
    print_table(["method", "tasks", *measured], rows)
    write_json(options.json, {"fusionbench": FUSIONBENCH, "distances": found})


if __name__ == "__main__":
    main()
