"""A comparison of methods: its scores, as a table, as JSON, and as a picture."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuromerge_hf.tuning.bootstrap import Interval
from neuromerge_hf.tuning.evaluation import Scores

TABLE = "comparison"
"""The name of the files: .json, .md and .png."""


@dataclass(frozen=True)
class Comparison:
    """What `compare_methods` found.

    Attributes:
        base: the scores of the base.
        experts: the scores of each expert by its name.
        methods: the scores of each method's merge, by its name, with the settings that are not the defaults.
        intervals: how much better the best method is on average than each other, where it is known by example.
        winner: the method that is better than all others beyond the noise, if there is one.
        verdict: the same in words, with the reason.
    """

    base: Scores
    experts: dict[str, Scores]
    methods: dict[str, Scores]
    intervals: dict[str, Interval]
    winner: str | None
    verdict: str

    @property
    def best_expert(self) -> dict[str, float]:
        """The best score of an expert on each task."""
        return {task: max(scores.tasks[task] for scores in self.experts.values()) for task in self.base.tasks}

    def retained(self, scores: Scores) -> float | None:
        """The mean over the tasks of a score's share of the best expert's; None where that is not positive."""
        best = self.best_expert
        if min(best.values()) <= 0:
            return None
        return sum(scores.tasks[task] / best[task] for task in best) / len(best)

    def save(self, folder: Path) -> None:
        """Write the table as JSON and Markdown, and draw it."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(self, folder / f"{TABLE}.json")
        (folder / f"{TABLE}.md").write_text(str(self))
        draw_bars(self, folder / f"{TABLE}.png")

    def __str__(self) -> str:
        return f"{to_markdown(self)}\n{self.verdict}\n"


def rows(comparison: Comparison) -> dict[str, Scores]:
    """Everything that was evaluated, by the name that the table gives it."""
    experts = {f"expert {name}": scores for name, scores in comparison.experts.items()}
    return {"base": comparison.base, **experts, **comparison.methods}


def to_markdown(comparison: Comparison) -> str:
    """A Markdown table: a line for each model, its score on each task, the average, and the share retained."""
    tasks = list(comparison.base.tasks)
    lines = [["", *tasks, "average", "of the experts' own"]]
    lines.append(["---"] + ["---:"] * (len(tasks) + 2))
    for name, scores in rows(comparison).items():
        retained = comparison.retained(scores)
        share = "" if retained is None else f"{retained:.1%}"
        lines.append([name, *(f"{scores.tasks[task]:.4f}" for task in tasks), f"{scores.average:.4f}", share])
    if comparison.intervals:
        lines = [[*line, ""] for line in lines]
        lines[0][-1] = "the best's lead"
        lines[1][-1] = "---:"
        for line in lines[2:]:
            if interval := comparison.intervals.get(line[0]):
                line[-1] = f"{interval.difference:.4f} ({interval.low:.4f} to {interval.high:.4f})"
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_json(comparison: Comparison, path: Path) -> None:
    """Everything, without the scores by example."""
    content: dict[str, Any] = {
        "models": [
            {"name": name, "tasks": scores.tasks, "average": scores.average, "retained": comparison.retained(scores)}
            for name, scores in rows(comparison).items()
        ],
        "intervals": {name: dataclasses.asdict(interval) for name, interval in comparison.intervals.items()},
        "winner": comparison.winner,
        "verdict": comparison.verdict,
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def draw_bars(comparison: Comparison, path: Path) -> None:
    """Draw a bar for the average of each method, with its tasks as dots, and lines for the base and the experts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    methods = comparison.methods
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(methods)), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    axes.barh(list(methods), [scores.average for scores in methods.values()], color="#9db8d9", label="average")
    for number, task in enumerate(comparison.base.tasks):
        axes.plot(
            [scores.tasks[task] for scores in methods.values()], list(methods), ".", color=f"C{number}", label=task
        )
    axes.axvline(comparison.base.average, color="grey", linestyle=":", label="base")
    experts = comparison.best_expert.values()
    axes.axvline(sum(experts) / len(experts), color="black", linestyle="--", label="experts' own")
    axes.invert_yaxis()
    axes.set_xlabel("score")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150, metadata={"Software": None})
