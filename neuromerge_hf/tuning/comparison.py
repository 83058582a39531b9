"""The result of comparing methods, as a table, as JSON and as a picture."""

import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuromerge_hf.storage.writing import write_file
from neuromerge_hf.text import Summary
from neuromerge_hf.tuning.evaluation import Scores

if TYPE_CHECKING:
    from neuromerge_hf.tuning.bootstrap import Interval  # imports numpy, and the command line imports this module

TABLE = "comparison"
"""The name of the files, without .json, .md or .png."""

FILES = tuple(f"{TABLE}.{suffix}" for suffix in ("json", "md", "png"))

NOT_COMPARED = {
    "config": "pass a list of configurations as methods=",
    "overwrite": "the files of an earlier comparison are always replaced",
    "max_shard_size": "no merged model is kept",
    "tuned_on": "no merged model is kept, and so no card that could name the data",
}
"""The options of a merge that a comparison does not take, each with the reason or what to do."""


@dataclass(frozen=True, repr=False)
class Comparison(Summary):
    """The result of `compare_methods`.

    Attributes:
        base: the scores of the base.
        experts: the scores of each expert by its name.
        methods: the scores of each merge, by the method's name with the settings that are not the defaults.
        intervals: the best method's average lead over each other method; empty without scores by example.
        winner: the method whose lead over all others is statistically significant; None if there is none.
        verdict: the result in words, with the reason.

    Examples:
        >>> def evaluate(model):
        ...     return -float(model.lm_head.weight.norm())
        >>> found = compare_methods(["math"], evaluate, base_model="base", methods=[TIESConfig()])
        >>> found.verdict
        'Only ties was evaluated, so there is nothing to compare it with.'
    """

    base: Scores
    experts: dict[str, Scores]
    methods: dict[str, Scores]
    intervals: dict[str, "Interval"]
    winner: str | None
    verdict: str

    @property
    def best_expert(self) -> dict[str, float]:
        """The best expert's score on each task."""
        return {task: max(scores.tasks[task] for scores in self.experts.values()) for task in self.base.tasks}

    def retained(self, scores: Scores) -> float | None:
        """The share of the best expert's score, averaged over the tasks; None if one of these is not positive."""
        best = self.best_expert
        if min(best.values()) <= 0:
            return None
        return sum(scores.tasks[task] / best[task] for task in best) / len(best)

    def save(self, folder: Path) -> None:
        """Write the table as JSON and Markdown into an existing folder, and draw the picture."""
        write_file(folder / f"{TABLE}.json", json.dumps(self.to_dict(), indent=2) + "\n")
        write_file(folder / f"{TABLE}.md", str(self))
        draw_bars(self, folder / f"{TABLE}.png")

    def to_dict(self) -> dict[str, Any]:
        """The scores and the verdict as plain Python objects, for JSON, without the scores by example."""
        return {
            "models": [
                {"name": name, "tasks": scores.tasks, "average": scores.average, "retained": self.retained(scores)}
                for name, scores in rows(self).items()
            ],
            "intervals": {name: dataclasses.asdict(interval) for name, interval in self.intervals.items()},
            "winner": self.winner,
            "verdict": self.verdict,
        }

    def __repr__(self) -> str:
        return f"<Comparison: {', '.join(self.methods):.100}; winner: {self.winner}>"

    def _repr_markdown_(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return f"{to_markdown(self)}\n{self.verdict}\n"


def rows(comparison: Comparison) -> dict[str, Scores]:
    """All scores, by the name of their row in the table."""
    experts = {f"expert {name}": scores for name, scores in comparison.experts.items()}
    return {"base": comparison.base, **experts, **comparison.methods}


def to_markdown(comparison: Comparison) -> str:
    """A Markdown table. Each row has a model's score on each task, their average, and the share retained."""
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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    write_file(path, buffer.getvalue())
