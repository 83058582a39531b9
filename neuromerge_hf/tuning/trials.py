"""The candidates of a tuning, as a table and as a picture."""

import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuromerge_hf.storage.writing import write_file

TABLE = "tuning"
"""The name of the files, without .json, .md or .png."""


@dataclass(frozen=True)
class Trial:
    """One candidate and its scores.

    Attributes:
        density: the fraction of each task vector that was kept.
        lambda_parallel: the scale of the parallel part, lambda_1 in the paper.
        lambda_orthogonal: the scale of the orthogonal part, lambda_2 in the paper.
        score: the score that is optimised.
        tasks: the score of each task.
        is_rule: whether the lambdas are those of the automatic rule.
    """

    density: float
    lambda_parallel: float
    lambda_orthogonal: float
    score: float
    tasks: dict[str, float]
    is_rule: bool = False


def save_table(trials: Sequence[Trial], best: Trial, folder: Path, greater_is_better: bool = True) -> None:
    """Write all candidates, best first, as JSON and Markdown, and draw the surface."""
    ordered = sorted(trials, key=lambda trial: trial.score, reverse=greater_is_better)
    content = {"best": dataclasses.asdict(best), "trials": [dataclasses.asdict(trial) for trial in ordered]}
    write_file(folder / f"{TABLE}.json", json.dumps(content, indent=2) + "\n")
    write_file(folder / f"{TABLE}.md", to_markdown(ordered, best))
    draw_surface(trials, best, folder / f"{TABLE}.png")


def to_markdown(trials: Sequence[Trial], best: Trial) -> str:
    """A Markdown table with a row for each candidate."""
    tasks = list(best.tasks) if len(best.tasks) > 1 else []
    lines = [["density", "lambda_parallel", "lambda_orthogonal", "score", *tasks, ""]]
    lines.append(["---:"] * (len(lines[0]) - 1) + ["---"])
    for trial in trials:
        remarks = ["best"] * (trial == best) + ["automatic rule"] * trial.is_rule
        numbers = [trial.density, trial.lambda_parallel, trial.lambda_orthogonal]
        scores = [trial.score, *(trial.tasks[task] for task in tasks)]
        lines.append([f"{n:.4g}" for n in numbers] + [f"{score:.4f}" for score in scores] + [", ".join(remarks)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw_surface(trials: Sequence[Trial], best: Trial, path: Path) -> None:
    """Draw the score over lambda_2, with a line for each lambda_1 and a panel for each density."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    densities = sorted({trial.density for trial in trials})
    figure = Figure(figsize=(1 + 4 * len(densities), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, len(densities), sharey=True, squeeze=False)[0]
    for panel, density in zip(panels, densities, strict=True):
        here = [trial for trial in trials if trial.density == density]
        for parallel in sorted({trial.lambda_parallel for trial in here}):
            line = sorted((t.lambda_orthogonal, t.score) for t in here if t.lambda_parallel == parallel)
            panel.plot(*zip(*line, strict=True), marker=".", label=f"$\\lambda_1$ = {parallel:g}")
        for trial in here:
            if trial.is_rule:
                panel.plot(trial.lambda_orthogonal, trial.score, "ko", fillstyle="none", label="automatic rule")
        if density == best.density:
            panel.plot(best.lambda_orthogonal, best.score, "k*", markersize=10, label="best")
        panel.set(title=f"density {density:g}", xlabel="$\\lambda_2$ (orthogonal)")
    panels[0].set_ylabel("score")
    panels[-1].legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    write_file(path, buffer.getvalue())
