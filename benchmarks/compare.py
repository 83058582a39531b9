"""Times our merge, mergekit's TIES, and plain reading and writing on the same files.

It also times the direct SVD form of the method and the Gram form of neuromerge on one weight.

    pip install -e .
    python benchmarks/compare.py --folder family                  # 1.1 B parameters, 3 experts, 11 GB of disk
    python benchmarks/compare.py --folder family --skip mergekit  # a minute instead of ten

The script makes the model family if it is missing. "Read twice, write" runs `cat` twice on all inputs and writes one
output from the second read of the base. A merge at density 1 needs no threshold, so it reads its inputs once. "The
first merge" compiles its kernel and hashes its inputs; later ones find both in caches. The inputs of a command are read
twice right before it, so that no command waits for the disk. On file systems that share blocks between copies (btrfs,
XFS), `cat` writes nothing: use another file system.

Memory is the peak of a process's private memory. GB/s counts inputs and output once, however often they are read.
mergekit runs with its defaults, in its own virtual environment with this environment's version of torch.
"""

import argparse
import json
import shlex
import subprocess
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import COLUMNS, RESULTS, Case, machine, ours, print_table, remove, save_png, start, weights, write_json
from torch import Tensor

from families import make_family
from neuromerge_hf.kernel import merge_neurons

MERGEKIT = "0.1.5"
DENSITY = 0.2
PARTS = ("floor", "ours", "mergekit", "svd", "picture")


def floor(base: Path, experts: list[Path], output: Path, reads: int) -> Case:
    """Return a command that reads every input `reads` times and writes the last read of the base."""
    paths = [weights(model) for model in (base, *experts)]
    every, others = (shlex.join(map(str, some)) for some in (paths, paths[1:]))
    script = f"cat {others} > /dev/null && cat {shlex.quote(str(paths[0]))} > {shlex.quote(str(output))}"
    if reads == 2:
        script = f"cat {every} > /dev/null && {script}"
    name = f"read {'twice' if reads == 2 else 'once'}, write"
    return Case(name, ["sh", "-c", script], paths, output, paths[0].stat().st_size)


def nothing_known(folder: Path) -> list[str]:
    """Return an environment in which no kernel is compiled yet, and no hash of an input is known."""
    return [f"NUMBA_CACHE_DIR={folder / 'numba'}", f"HF_HOME={folder / 'home'}"]


def mergekit_environment(folder: Path) -> Path:
    """Make a virtual environment with mergekit if it is missing, and return its command."""
    command = folder / "bin" / "mergekit-yaml"
    if not command.exists():
        print(f"Installing mergekit {MERGEKIT} into {folder}", flush=True)
        venv.create(folder, with_pip=True)
        # torch comes first, so that mergekit runs on the same version as neuromerge.
        for package in (f"torch=={torch.__version__.split('+')[0]}", f"mergekit=={MERGEKIT}"):
            subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "-q", package], check=True)
    return command


def mergekit(command: Path, base: Path, experts: list[Path], scratch: Path) -> Case:
    """Return a merge with mergekit's TIES."""
    config = {
        "merge_method": "ties",
        "base_model": str(base),
        "dtype": "bfloat16",
        "models": [{"model": str(expert), "parameters": {"weight": 1.0, "density": DENSITY}} for expert in experts],
    }
    path = scratch / "ties.yml"
    path.write_text(json.dumps(config))  # JSON is YAML
    output = scratch / "mergekit"
    paths = [weights(model) for model in (base, *experts)]
    return Case(
        f"mergekit {MERGEKIT}, TIES, density {DENSITY}",
        [str(command), str(path), str(output)],
        paths,
        output,
        paths[0].stat().st_size,
        prepare=[str(command), "--help"],
    )


def direct(x: Tensor, lambda_parallel: float, lambda_orthogonal: float) -> Tensor:
    """Merge as the paper defines it: neuron by neuron, with a singular value decomposition, in float64."""

    def elect_mean(values: Tensor) -> Tensor:
        elected = values.sign() == values.sum(0).sign()
        return (values * elected).sum(0) / elected.sum(0).clamp(min=1)

    merged = []
    for rows in x.double():
        base, task_vectors = rows[0], rows[1:]
        alpha = task_vectors @ base / (base @ base)
        u, s, vh = torch.linalg.svd(task_vectors - alpha.unsqueeze(1) * base, full_matrices=False)
        merged.append(base + lambda_parallel * elect_mean(alpha) * base + lambda_orthogonal * elect_mean(u * s) @ vh)
    return torch.stack(merged).float()


def compare_svd(experts: int, width: int = 1024, repeat: int = 3) -> dict[str, Any]:
    """Time the direct SVD form and the Gram form on one square weight, on one thread."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = 1e-3 * torch.randn(width, 1 + experts, width, generator=generator)
    x[:, 0] *= 20

    def seconds(function: Callable[..., Tensor]) -> tuple[float, Tensor]:
        times = []
        for _ in range(1 + repeat):  # the first one warms up
            started = time.perf_counter()
            result = function(x, 0.5, 1.5)
            times.append(time.perf_counter() - started)
        return median(times[1:]), result

    slow, expected = seconds(direct)
    fast, merged = seconds(merge_neurons)
    change = (expected - x[:, 0]).norm(dim=1)
    agreeing = ((merged - expected).norm(dim=1) < 1e-5 * change).float().mean().item()
    return {
        "experts": experts,
        "width": width,
        "direct_seconds": slow,
        "ours_seconds": fast,
        "ratio": slow / fast,
        "neurons_that_agree": agreeing,
    }


def draw(cases: dict[str, Case], title: str, path: Path) -> None:
    """Draw bars of time and memory, in colours that can be read on white and on black."""
    from matplotlib.figure import Figure

    grey, colours = "#7d848c", {"floor": "#9aa2ab", "ours": "#2f81f7", "mergekit": "#d9822b"}
    figure = Figure(figsize=(9, 0.6 + 0.42 * len(cases)), dpi=160, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    figure.suptitle(title, fontsize=11, color=grey)
    scales: list[tuple[str, str, Callable[[Case], float]]] = [
        ("seconds", "{:.1f}", lambda case: case.wall),
        ("peak private memory, GB", "{:.2f}", lambda case: case.private_memory / 1e9),
    ]
    for axis, (label, form, value) in zip(axes, scales, strict=True):
        values = [value(case) for case in cases.values()]
        bars = axis.barh(
            [case.name for case in cases.values()], values, color=[colours[part.split()[0]] for part in cases]
        )
        axis.bar_label(bars, [form.format(value) for value in values], padding=4, color=grey)
        axis.set_title(label, fontsize=10, color=grey, loc="left")
        axis.set_xlim(0, 1.15 * max(values))
        axis.spines[:].set_visible(False)
        axis.tick_params(left=False, bottom=False, labelbottom=False, labelcolor=grey)
    axes[0].invert_yaxis()
    save_png(figure, path, transparent=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("family"), help="the models, made if missing")
    parser.add_argument("--layers", type=int, default=22, help="22 give 1.1 B parameters (%(default)s)")
    parser.add_argument("--hidden", type=int, default=2048, help="4096 with --intermediate 11008 is the shape of 7 B")
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=1, help="how often each command runs; the median is shown")
    parser.add_argument("--skip", choices=PARTS, nargs="+", default=[])
    parser.add_argument("--mergekit-venv", type=Path, help="made if missing (FOLDER/mergekit-venv)")
    parser.add_argument("--json", type=Path, default=RESULTS / "compare.json")
    parser.add_argument("--picture", type=Path, default=RESULTS / "compare.png")
    options = parser.parse_args()
    parts = set(PARTS) - set(options.skip)

    folder = options.folder.absolute()
    base, experts = folder / "base", [folder / f"expert-{number}" for number in range(1, options.experts + 1)]
    if (base / "config.json").exists():
        layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
        if layers != options.layers:
            parser.error(f"{folder} holds a family of {layers} layers: choose another --folder, or --layers {layers}")
    make_family(folder, options.layers, options.experts, hidden=options.hidden, intermediate=options.intermediate)

    with tempfile.TemporaryDirectory(dir=folder, prefix="out-") as temporary:
        scratch = Path(temporary)
        cases = {}
        if "floor" in parts:
            cases["floor"] = floor(base, experts, scratch / "copy", reads=2)
            cases["floor 1"] = floor(base, experts, scratch / "copy", reads=1)
        if "ours" in parts:
            cases["start"] = start(scratch / "none")
            for part, (name, density, *environment) in {
                "ours first": (f"neuromerge, density {DENSITY}, the first merge", DENSITY, *nothing_known(scratch)),
                "ours": (f"neuromerge, density {DENSITY}", DENSITY),
                "ours torch": (f"neuromerge, density {DENSITY}, without numba", DENSITY, "NUMBA_DISABLE_JIT=1"),
                "ours 1": ("neuromerge, density 1", 1),
            }.items():
                method = ("--method", "neuromerging", "--density", density)
                cases[part] = ours(name, experts, base, scratch / "ours", *method, environment=environment)
        if "mergekit" in parts:
            environment = options.mergekit_venv or folder / "mergekit-venv"
            cases["mergekit"] = mergekit(mergekit_environment(environment.absolute()), base, experts, scratch)
        for _ in range(options.repeat):  # the commands alternate, so that a slow minute does not hit only one of them
            for case in cases.values():
                print(case.name, flush=True)
                case.run()
            remove(scratch / "numba")
            remove(scratch / "home")

    parameters = weights(base).stat().st_size // 2
    family = {"parameters": parameters, "experts": options.experts, "layers": options.layers, "dtype": "bfloat16"}
    hardware = "{cores} cores, {memory_gib} GiB of memory".format(**machine())
    title = f"Merging {options.experts} experts of {parameters / 1e9:.2g} B parameters: {hardware}"
    print(f"\n{title}\n")
    print_table(COLUMNS, [case.row() for case in cases.values()])
    ratios = {
        f"{cases[one].name} / {cases[other].name}": cases[one].wall / cases[other].wall
        for one, other in (("ours", "floor"), ("ours 1", "floor 1"), ("mergekit", "ours"))
        if one in cases and other in cases
    }
    print("\n" + "".join(f"wall time of {name}: {ratio:.1f}\n" for name, ratio in ratios.items()))

    svd = [compare_svd(experts) for experts in (3, 8)] if "svd" in parts else []
    if svd:
        print("One weight of 1024 x 1024, float32, one thread:\n")
        header = ["experts", "direct SVD form, s", "neuromerge, s", "times faster", "neurons that agree"]
        forms = ["{experts}", "{direct_seconds:.3f}", "{ours_seconds:.4f}", "{ratio:.0f}", "{neurons_that_agree:.1%}"]
        print_table(header, [[form.format(**row) for form in forms] for row in svd])

    results = [case.as_json() for case in cases.values()]
    write_json(options.json, {"family": family, "results": results, "wall_ratios": ratios, "svd": svd})
    if "picture" in parts and cases:
        draw({part: case for part, case in cases.items() if case.bytes}, title, options.picture)


if __name__ == "__main__":
    main()
