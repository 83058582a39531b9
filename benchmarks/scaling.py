"""Measures how time and memory grow with the number of experts, the size of the model and the density.

    python benchmarks/scaling.py --folder families          # 30 GB of disk at a time, half an hour
    python benchmarks/scaling.py --folder families --small  # only to see that it runs

The script makes one model family after the other, and removes it afterwards unless --keep is given. Inputs are warm,
as in `compare.py`. The families are 2, 4 and 8 experts of 0.5 B parameters, 2 experts of three times the parameters,
2 experts with an embedding matrix of 256 000 x 4096, and eight LoRA adapters on 1.1 B parameters. The adapters are
compared with a plain copy of their base.
"""

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import COLUMNS, LOADING, RESULTS, Case, machine, ours, print_table, start, weights, write_json

from families import make_family

DENSITIES = (0.2, 1)


@dataclass(frozen=True)
class Family:
    """A model family to measure.

    Attributes:
        name: the family's name in tables.
        shape: arguments of `make_family`.
        experts: the numbers of experts to merge.
        densities: the densities to merge at.
        copy: whether a plain copy of the base is measured as well.
    """

    name: str
    shape: dict[str, Any]
    experts: tuple[int, ...] = (2,)
    densities: tuple[float, ...] = DENSITIES
    copy: bool = False


FAMILIES = [
    Family("small", {"layers": 8}, experts=(2, 4, 8)),
    # Embeddings are a quarter of the small model, so this is exactly three times its parameters.
    Family("large", {"layers": 30}),
    Family("embedding", {"layers": 1, "hidden": 4096, "intermediate": 11008, "vocabulary": 256000}),
    Family("LoRA", {"layers": 22, "rank": 16}, experts=(8,), copy=True),
]


def reduced(shape: dict[str, Any]) -> dict[str, Any]:
    """Return a smaller shape, to try the script with."""
    return shape | {"hidden": 512, "intermediate": 1024, "vocabulary": 20 * shape.get("hidden", 100)}


def cases_of(family: Family, folder: Path) -> dict[tuple[Any, ...], Case]:
    """Return the commands to measure on a family.

    The keys are (family, experts, density) for merges, (family, "cp") for the copy, and (family, "start") for loading.
    """
    base = folder / "base"
    parameters = f"{weights(base).stat().st_size / 2e9:.2g} B"
    cases: dict[tuple[Any, ...], Case] = {}
    for count in family.experts:
        models = [folder / f"expert-{number}" for number in range(1, count + 1)]
        for density in family.densities:
            name = f"{family.name}, {parameters} x {count}, density {density}"
            options = ("--method", "neuromerging", "--density", density)
            cases[family.name, count, density] = ours(name, models, base, folder / "merged", *options)
    if family.copy:
        cases[family.name, "start"] = start(folder / "none")
        source, target = weights(base), folder / "copy"
        command = ["cp", str(source), str(target)]
        cases[family.name, "cp"] = Case(f"cp of {parameters}", command, [source], target, source.stat().st_size)
        for combination in ("linear", "ties"):
            name = f"PEFT, add_weighted_adapter, {combination}"
            cases[family.name, combination] = peft(name, combination, models, base, folder / "merged")
    return cases


def peft(name: str, combination: str, adapters: list[Path], base: Path, output: Path) -> Case:
    """Return PEFT's own merge of adapters, which is written as a full model."""
    script = Path(__file__).with_name("peft_merge.py")
    command = [str(part) for part in (sys.executable, script, combination, base, output, *adapters)]
    inputs = [weights(model) for model in (base, *adapters)]
    return Case(name, command, inputs, output, weights(base).stat().st_size, prepare=LOADING)


def ratios_of(cases: dict[tuple[Any, ...], Case]) -> list[tuple[str, float, float]]:
    """Return ratios of the measurements, each as (description, measured value, upper bound)."""
    small, ratios = FAMILIES[0].name, []
    for density in DENSITIES:
        if not (one := cases.get((small, 2, density))):
            continue
        if eight := cases.get((small, 8, density)):
            ratios.append((f"time of 8 experts / 2, density {density}", eight.wall / one.wall, 4.5))
        if large := cases.get(("large", 2, density)):
            ratios.append((f"time of 3 times the parameters / 1, density {density}", large.wall / one.wall, 3.3))
            ratio = large.private_memory / one.private_memory
            ratios.append((f"memory of 3 times the parameters / 1, density {density}", ratio, 1.1))
        if embedding := cases.get(("embedding", 2, density)):
            ratio = embedding.private_memory / one.private_memory
            ratios.append((f"memory of the large embedding / small, density {density}", ratio, 1.1))
    if lora := cases.get(("LoRA", 8, 1)):
        ratios.append(("time of 8 LoRA adapters / 2 cp of the base", lora.wall / (2 * cases["LoRA", "cp"].wall), 1))
    merges = [case.private_memory for key, case in cases.items() if len(key) == 3]
    ratios.append(("largest private memory, GB", max(merges) / 1e9, 1))
    return ratios


def main() -> None:
    names = [family.name for family in FAMILIES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("families"), help="the families, made if missing")
    parser.add_argument("--only", choices=names, nargs="+", default=names)
    parser.add_argument("--repeat", type=int, default=1, help="how often each command runs; the median is shown")
    parser.add_argument("--keep", action="store_true", help="keep the families that were made")
    parser.add_argument("--small", action="store_true", help="a thousandth of the sizes, to try the script")
    parser.add_argument("--json", type=Path, default=RESULTS / "scaling.json")
    options = parser.parse_args()

    measured: dict[tuple[Any, ...], Case] = {}
    results = []
    for family in FAMILIES:
        if family.name not in options.only:
            continue
        folder = options.folder.absolute() / family.name.lower()
        found = folder.exists()
        print(f"{'Using' if found else 'Making'} {folder.name}", flush=True)
        try:
            shape = reduced(family.shape) if options.small else family.shape
            make_family(folder, experts=max(family.experts), **shape)
            cases = cases_of(family, folder)
            for _ in range(options.repeat):
                for case in cases.values():
                    print(case.name, flush=True)
                    case.run()
            measured |= cases
            results += [(case.row(), case.as_json()) for case in cases.values()]
        finally:
            if not (found or options.keep):
                shutil.rmtree(folder, ignore_errors=True)

    print("\n{cores} cores, {memory_gib} GiB of memory\n".format(**machine()))
    print_table(COLUMNS, [row for row, _ in results])
    ratios = ratios_of(measured)
    print()
    print_table(["", "measured", "at most"], [[what, f"{value:.2f}", f"{most:g}"] for what, value, most in ratios])
    bounds = [{"what": what, "measured": value, "at_most": most} for what, value, most in ratios]
    write_json(options.json, {"results": [result for _, result in results], "ratios": bounds})


if __name__ == "__main__":
    main()
