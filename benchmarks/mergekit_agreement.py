"""Compares Task Arithmetic and TIES-Merging with mergekit's output on the same files, entry by entry.

    python benchmarks/mergekit_agreement.py --folder small-family

mergekit trims each tensor on its own, while the paper trims the whole model. So TIES is compared at density 1, then
with neuromerge on one tensor at a time, and last with both tools in their normal use. Two more differences remain. If
the changes sum to exactly 0, which is common in bfloat16 files, mergekit elects the positive sign, and neuromerge keeps
the base, like the paper's algorithm. These entries are counted apart. Of the entries that equal a threshold, mergekit
keeps some, and neuromerge keeps all. Both compute and write float32. Two entries agree if they differ by at most two
rounding errors.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, print_table, weights, write_json
from compare import MERGEKIT, mergekit_environment
from safetensors.torch import load_file
from torch import Tensor

from families import make_family
from neuromerge_hf import TaskArithmeticConfig, TIESConfig, merge
from neuromerge_hf.config import MergeConfig

DENSITY, SCALE, EXPERTS = 0.2, 0.4, 3

State = dict[str, Tensor]


def theirs(
    command: Path, base: Path, experts: list[Path], folder: Path, method: str, parameters: dict[str, float]
) -> State:
    """Return the weights that mergekit merges."""
    config = {
        "merge_method": method,
        "base_model": str(base),
        "dtype": "float32",
        "models": [{"model": str(expert), "parameters": parameters} for expert in experts],
    }
    path = folder / "config.yml"
    path.write_text(json.dumps(config))  # JSON is YAML
    subprocess.run([command, path, folder / "theirs"], check=True, capture_output=True)
    return load_file(folder / "theirs" / "model.safetensors")


def ours(base: Path, experts: list[Path], folder: Path, config: MergeConfig) -> State:
    """Return the weights that neuromerge merges."""
    merge(experts, folder / "ours", base_model=base, config=config, dtype="float32", device="cpu", overwrite=True)
    return load_file(folder / "ours" / "model.safetensors")


def tensor_by_tensor(base: Path, experts: list[Path], folder: Path, density: float) -> State:
    """Return the weights of neuromerge's TIES, with each tensor trimmed on its own."""
    names = list(load_file(weights(base)))
    merged = {}
    for name in names:
        config = TIESConfig(density=density, exclude=tuple(other for other in names if other != name))
        merged[name] = ours(base, experts, folder, config)[name]
    return merged


def agreement(first: State, second: State, base: State) -> dict[str, Any]:
    """Count the entries that agree, and measure the relative distance of the two changes of the base.

    Entries for which only the first one keeps the base are counted apart, and do not count for the distance.
    """
    agreeing = without_sign = total = 0
    apart = size = 0.0
    for name, theta in base.items():
        one, other = first[name].double(), second[name].double()
        largest = torch.stack([one, other, theta.double()]).abs().amax(0)
        close = (one - other).abs() <= 2 * torch.finfo(torch.float32).eps * largest
        kept = ~close & (one == theta)
        agreeing, without_sign, total = (
            agreeing + int(close.sum()),
            without_sign + int(kept.sum()),
            total + close.numel(),
        )
        apart += float((one - other)[~kept].square().sum())
        size += float((other - theta.double())[~kept].square().sum())
    found = {"entries": total, "agreeing": agreeing, "base_kept_by_ours_alone": without_sign}
    return {**found, "relative_distance_elsewhere": (apart / size) ** 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("small-family"), help="the models, made if missing")
    parser.add_argument("--mergekit-venv", type=Path, help="made if missing (FOLDER/mergekit-venv)")
    parser.add_argument("--json", type=Path, default=RESULTS / "mergekit_agreement.json")
    options = parser.parse_args()
    folder = options.folder.absolute()
    make_family(folder, layers=1, experts=EXPERTS, hidden=512, intermediate=1408, vocabulary=4000)
    base, experts = folder / "base", [folder / f"expert-{number}" for number in range(1, EXPERTS + 1)]
    command = mergekit_environment((options.mergekit_venv or folder / "mergekit-venv").absolute())
    before = {name: tensor.float() for name, tensor in load_file(weights(base)).items()}

    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        inputs = (base, experts, scratch)
        arithmetic = theirs(command, *inputs, "task_arithmetic", {"weight": SCALE})
        whole = theirs(command, *inputs, "ties", {"weight": 1.0, "density": 1.0})
        trimmed = theirs(command, *inputs, "ties", {"weight": 1.0, "density": DENSITY})
        results = {
            f"Task Arithmetic, {SCALE}": (ours(*inputs, TaskArithmeticConfig(scale=SCALE)), arithmetic),
            "TIES, density 1": (ours(*inputs, TIESConfig(density=1)), whole),
            f"TIES, density {DENSITY}, each tensor on its own": (tensor_by_tensor(*inputs, DENSITY), trimmed),
            f"TIES, density {DENSITY}, the whole model": (ours(*inputs, TIESConfig(density=DENSITY)), trimmed),
        }
    found = {name: agreement(first, second, before) for name, (first, second) in results.items()}
    print(f"\n{EXPERTS} experts; ours and mergekit {MERGEKIT}:\n")
    header = ["", "entries", "that agree", "only ours keeps the base", "others", "distance elsewhere, of the change"]
    rows = []
    for name, row in found.items():
        counts = row["entries"], row["agreeing"], row["base_kept_by_ours_alone"]
        others = counts[0] - counts[1] - counts[2]
        shares = [f"{count / counts[0]:.4%}" for count in (*counts[1:], others)]
        rows.append([name, f"{counts[0]:,}", *shares, f"{row['relative_distance_elsewhere']:.1e}"])
    print_table(header, rows)
    write_json(options.json, {"mergekit": MERGEKIT, "agreement": found})


if __name__ == "__main__":
    main()
