"""Turns the scores of the variants into results/variants.md."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from experts import KINDS, REGIMES
from summary import RESULTS, table
from tasks import TASKS

TITLES = {"full": "full", "lora": "LoRA", "far": "far", "near": "near"}

Cells = dict[str, dict[int, list[float]]]
"""By kind and seed: of one set of experts, or of several sets of the same size."""


class Scores:
    """What has been measured, in %."""

    def __init__(self, cache: Path):
        self.rows = [row for file in sorted((cache / "variants").glob("*/*.jsonl")) for row in _rows(file)]

    def cells(self, size: int, column: str = "accuracy", **wanted: Any) -> Cells:
        """The accuracies (or another column) of the variants that are like `wanted`."""
        found: Cells = {}
        for row in self.rows:
            if row["size"] == size and all(row["variant"][key] == value for key, value in wanted.items()):
                value = 100 * mean(row["accuracy"].values()) if column == "accuracy" else row[column]
                found.setdefault(row["kind"], {}).setdefault(row["seed"], []).append(value)
        return found


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    kind, seed = file.parent.name.split("-")
    for line in file.read_text().splitlines():
        yield {"kind": kind, "seed": int(seed), "size": len(file.stem.split("-"))} | json.loads(line)


def _cell(cells: Cells, kind: str, form: str = ".1f") -> str:
    """The mean over the seeds, and each seed's."""
    seeds = [mean(values) for _, values in sorted(cells.get(kind, {}).items())]
    if not seeds:
        return ""
    each = ", ".join(format(value, form) for value in seeds)
    return f"{mean(seeds):{form}} ({each})"


def _minus(cells: Cells, other: Cells, kind: str) -> str:
    seeds = [mean(values) - mean(other[kind][seed]) for seed, values in sorted(cells.get(kind, {}).items())]
    return f"{mean(seeds):+.1f} ({', '.join(format(value, '+.1f') for value in seeds)})" if seeds else ""


def _overall(cells: Cells) -> float:
    """The mean over the kinds of the mean over the seeds."""
    return mean(mean(mean(values) for values in seeds.values()) for seeds in cells.values())


def _least_gain(cells: Cells, other: Cells) -> float:
    """Of any seed of any kind."""
    return min(mean(cells[kind][seed]) - mean(other[kind][seed]) for kind in cells for seed in cells[kind])


def _rule(rule: str) -> str:
    return rule if rule == "automatic" else f"{float(rule):g} lengths"


def write_report(cache: Path) -> None:
    """Average validation accuracy of every variant: the mean of the seeds, in brackets each."""
    from variants import AVERAGE, DENSITIES, LENGTHS, SETS

    scores, all_tasks = Scores(cache), len(TASKS)
    rules = ("automatic", *map(str, LENGTHS))
    titles = [TITLES[kind] for kind in REGIMES]

    def lines() -> Iterable[str]:
        plain = {"left": "", "parallel": 0.0}
        yield "Average validation accuracy in %, six tasks: the mean of the seeds (each seed's).\n"
        averaging = scores.cells(all_tasks, elect=AVERAGE, density=1.0, rule="automatic", **plain)
        rows = [["merge", "density", "lambda_2", *titles, "all", "least gain over averaging"]]
        merges = [(AVERAGE, 1.0), *(("mean", density) for density in DENSITIES), ("weighted", 0.2)]
        for elect, density in merges:
            for rule in rules:
                cells = scores.cells(all_tasks, elect=elect, density=density, rule=rule, **plain)
                if cells:
                    name = "average" if elect == AVERAGE else f"elect {elect}"
                    title = "1" if elect == AVERAGE and rule == "automatic" else _rule(rule)
                    row = [name, f"{density:g}", title, *(_cell(cells, kind) for kind in REGIMES)]
                    rows.append([*row, f"{_overall(cells):.1f}", f"{_least_gain(cells, averaging):+.1f}"])
        yield from table(rows)

        for column, text in (
            ("lambda", "What lambda_2 is by the paper's rule"),
            ("length", "How long the merged task vector then is, in mean lengths of the experts'"),
            ("kept", "Which share of an expert's task vector it then holds"),
        ):
            yield f"\n{text}, six tasks.\n"
            rows = [["density", *titles]]
            for density in DENSITIES:
                cells = scores.cells(all_tasks, column, elect="mean", density=density, rule="automatic", **plain)
                rows.append([f"{density:g}", *(_cell(cells, kind, ".2f") for kind in REGIMES)])
            yield from table(rows)

        yield "\nPoints gained at density 0.2 with the automatic lambda_2.\n"
        before = scores.cells(all_tasks, elect="mean", density=0.2, rule="automatic", **plain)
        rows = [["what", *titles]]
        changes = {
            "parameters that are not neuronal stay": {"left": "1d", "parallel": 0.0},
            "embeddings stay": {"left": "embeddings", "parallel": 0.0},
            "lambda_1 = lambda_2 / 2": {"left": "", "parallel": 0.5},
            "lambda_1 = lambda_2": {"left": "", "parallel": 1.0},
        }
        for title, change in changes.items():
            cells = scores.cells(all_tasks, elect="mean", density=0.2, rule="automatic", **change)
            rows.append([title, *(_minus(cells, before, kind) for kind in REGIMES)])
        yield from table(rows)

        for size in SETS:
            if size != all_tasks:
                yield f"\nSets of {size} tasks: {', '.join(' + '.join(tasks) for tasks in SETS[size])}.\n"
                rows = [["density", "lambda_2", *(TITLES[kind] for kind in KINDS)]]
                for density in DENSITIES:
                    for rule in rules:
                        cells = scores.cells(size, elect="mean", density=density, rule=rule, **plain)
                        if cells:
                            rows.append([f"{density:g}", _rule(rule), *(_cell(cells, kind) for kind in KINDS)])
                yield from table(rows)

    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "variants.md").write_text("\n".join(lines()) + "\n")
