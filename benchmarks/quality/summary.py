"""Turns the scores of the test texts into results/quality.json, tables (results/tables.md) and a picture."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from experts import KINDS, SEEDS
from methods import METHODS, Setting
from tasks import TASKS

if TYPE_CHECKING:
    from run import Bench

RESULTS = Path(__file__).parent / "results"
TITLES = {"full": "Full fine-tunes", "lora": "LoRA adapters"}
OURS = "neuromerging"


class Scores:
    """The test accuracies in %, by task, of every family of experts that has been scored."""

    def __init__(self, bench: "Bench"):
        from run import BASE, EXPERTS, SIZES, Job

        self.sizes = SIZES
        self.seeds = SEEDS
        self.by_task: dict[tuple[str, int, int, str], dict[str, float]] = {}
        self.chosen: dict[tuple[str, int, int, str], Setting] = {}
        for kind in KINDS:
            for seed in SEEDS:
                for size in SIZES:
                    settings = {"base": BASE, "experts": EXPERTS} | {name: m.default for name, m in METHODS.items()}
                    for name in METHODS:
                        self.chosen[kind, seed, size, name] = bench.best(kind, seed, size, name)
                        settings[f"{name} tuned"] = self.chosen[kind, seed, size, name]
                    for name, setting in settings.items():
                        accuracy = bench.score(Job(kind, seed, size, setting, "test"))
                        scores = {task: 100 * value for task, value in accuracy.items()}
                        self.by_task[kind, seed, size, name] = scores

    def averages(self, kind: str, name: str, size: int | None = None) -> list[float]:
        """The average over the first `size` tasks, by default all, for each seed."""
        return [mean(self.by_task[kind, seed, size or len(TASKS), name].values()) for seed in self.seeds]


def write_report(bench: "Bench") -> None:
    scores = Scores(bench)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quality.json").write_text(json.dumps(_as_json(scores), indent=1) + "\n")
    (RESULTS / "tables.md").write_text("\n".join(_tables(scores)) + "\n")
    draw(scores, RESULTS / "quality.svg")
    print((RESULTS / "tables.md").read_text())


def write_validation(bench: "Bench") -> None:
    """results/validation.json: the validation accuracies in %, as far as they have been measured."""
    from run import all_families, validation_jobs

    rows = [
        {"experts": job.kind, "seed": job.seed, "tasks": job.size, "setting": str(job.setting)}
        | {task: round(100 * accuracy, 2) for task, accuracy in bench.score(job).items()}
        for job in validation_jobs(all_families())
        if job.file(bench.folder).is_file()
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "validation.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def _as_json(scores: Scores) -> dict[str, object]:
    return {
        "test accuracy in % by task": [
            {"experts": kind, "seed": seed, "tasks": size, "method": name}
            | {task: round(value, 2) for task, value in by_task.items()}
            for (kind, seed, size, name), by_task in scores.by_task.items()
        ],
        "chosen on validation": [
            {"experts": kind, "seed": seed, "tasks": size, "setting": str(setting)}
            for (kind, seed, size, _), setting in scores.chosen.items()
        ],
    }


def _tables(scores: Scores) -> Iterable[str]:
    yield f"Average test accuracy in %, {len(TASKS)} tasks, mean ± standard deviation over {len(SEEDS)} seeds.\n"
    rows = [["", *(TITLES[kind] + suffix for kind in KINDS for suffix in (", default", ", tuned"))]]
    for name, title in (("base", "base"), ("experts", "experts' own")):
        rows.append([title, *(cell for kind in KINDS for cell in (_spread(scores.averages(kind, name)), ""))])
    for name, method in METHODS.items():
        cells = []
        for kind in KINDS:
            cells += [_spread(scores.averages(kind, name))]
            cells += [_spread(scores.averages(kind, f"{name} tuned")) if method.tried else ""]
        rows.append([method.title, *cells])
    yield from table(rows)

    yield "\nNeuroMerging minus the other, in points: mean of the seeds (each seed's).\n"
    rows = [rows[0]]
    for name, method in METHODS.items():
        if name != OURS:
            cells = []
            for kind in KINDS:
                for suffix in ("", " tuned"):
                    pairs = zip(scores.averages(kind, OURS + suffix), scores.averages(kind, name + suffix), strict=True)
                    differences = [ours - other for ours, other in pairs]
                    each = ", ".join(f"{value:+.1f}" for value in differences)
                    cells.append(f"{mean(differences):+.1f} ({each})")
            rows.append([method.title, *cells])
    yield from table(rows)

    yield "\nAverage test accuracy in % of the first 2, 4 and 6 tasks.\n"
    rows = [["", *(f"{TITLES[kind]}, {size}" for kind in KINDS for size in scores.sizes)]]
    titles = {"base": "base", "experts": "experts' own"}
    for name, method in METHODS.items():
        titles[name] = method.title
        if method.tried:
            titles[f"{name} tuned"] = f"{method.title}, tuned"
    for name, title in titles.items():
        rows.append([title, *(_spread(scores.averages(kind, name, size)) for kind in KINDS for size in scores.sizes)])
    yield from table(rows)

    for kind in KINDS:
        yield f"\n{TITLES[kind]}, task by task, mean over the seeds.\n"
        rows = [["", *TASKS]]
        names = ["base", "experts", *(name + suffix for name in METHODS for suffix in ("", " tuned"))]
        for name in names:
            method = METHODS.get(name.removesuffix(" tuned"))
            if name.endswith(" tuned") and not (method and method.tried):
                continue
            values = [mean(scores.by_task[kind, seed, len(TASKS), name][task] for seed in SEEDS) for task in TASKS]
            rows.append([name.replace("_", " "), *(f"{value:.1f}" for value in values)])
        yield from table(rows)

    yield "\nWhat was chosen on the validation texts, for each seed: density / scale.\n"
    rows = [["", *(f"{TITLES[kind]}, seed {seed}" for kind in KINDS for seed in SEEDS)]]
    for name, method in METHODS.items():
        if method.tried:
            settings = [scores.chosen[kind, seed, len(TASKS), name] for kind in KINDS for seed in SEEDS]
            cells = [f"{setting.density or '-'} / {setting.scale:g}" for setting in settings]
            rows.append([f"{method.title} ({method.scale})", *cells])
    yield from table(rows)


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values):.1f}"


def table(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    yield "| " + " | ".join(rows[0]) + " |"
    yield "|---" + "|---:" * (len(rows[0]) - 1) + "|"
    for row in rows[1:]:
        yield "| " + " | ".join(row) + " |"


def draw(scores: Scores, path: Path) -> None:
    """Every method at its default and tuned, and over the number of tasks."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(KINDS), figsize=(11, 7.5), layout="constrained", squeeze=False)
    for kind, bars, lines in zip(KINDS, *axes, strict=True):
        names = list(METHODS)
        for shift, suffix, label in ((-0.2, "", "default"), (0.2, " tuned", "tuned on validation")):
            shown = [i for i, name in enumerate(names) if not suffix or METHODS[name].tried]
            averages = [scores.averages(kind, names[i] + suffix) for i in shown]
            bars.bar(
                [i + shift for i in shown],
                [mean(values) for values in averages],
                width=0.4,
                yerr=[stdev(values) for values in averages],
                label=label,
            )
        base, experts = mean(scores.averages(kind, "base")), mean(scores.averages(kind, "experts"))
        bars.axhline(experts, color="black", linewidth=1, label="experts' own")
        bars.axhline(base, color="gray", linewidth=1, linestyle=":", label="base")
        bars.set_ylim(base - 3, experts + 3)
        bars.set_xticks(range(len(names)), [METHODS[name].title for name in names], rotation=20, ha="right")
        bars.set_title(TITLES[kind])
        bars.set_ylabel("test accuracy, %")
        bars.legend(fontsize=8)
        for name, method in METHODS.items():
            lost = [
                [
                    e - m
                    for e, m in zip(scores.averages(kind, "experts", n), scores.averages(kind, name, n), strict=True)
                ]
                for n in scores.sizes
            ]
            lines.errorbar(
                scores.sizes, [mean(v) for v in lost], yerr=[stdev(v) for v in lost], label=method.title, capsize=2,
                linewidth=3 if name == OURS else 1.2,
            )  # fmt: skip
        lines.set_xticks(scores.sizes)
        lines.set_xlabel("merged experts, each method at its default")
        lines.set_ylabel("points below the experts' own")
        lines.legend(fontsize=8)
    figure.savefig(path)
    plt.close(figure)
