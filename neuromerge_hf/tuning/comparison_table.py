"""A comparison of methods as a table, as JSON, and as a picture."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuromerge_hf.tuning.evaluation import Scores

if TYPE_CHECKING:
    from neuromerge_hf.tuning.compare import Comparison


def rows(comparison: "Comparison") -> dict[str, Scores]:
    """Everything that was evaluated, by the name that the table gives it."""
    experts = {f"expert {name}": scores for name, scores in comparison.experts.items()}
    return {"base": comparison.base, **experts, **comparison.methods}


def to_markdown(comparison: "Comparison") -> str:
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


def write_json(comparison: "Comparison", path: Path) -> None:
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


def draw_bars(comparison: "Comparison", path: Path) -> None:
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
