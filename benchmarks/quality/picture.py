"""Draws results/quality.png."""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from figures import Scores
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from methods import METHODS, OURS
from tables import TITLES

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import save_png


def draw(scores: Scores, path: Path) -> None:
    """Draw the accuracy of every method, default and tuned, and below it the loss by the number of merged experts."""
    figure = Figure(figsize=(5.5 * len(scores.kinds), 7.5), dpi=110, layout="constrained")
    axes = figure.subplots(2, len(scores.kinds), squeeze=False)
    for kind, bars, lines in zip(scores.kinds, *axes, strict=True):
        _draw_methods(bars, scores, kind)
        _draw_sizes(lines, scores, kind)
    save_png(figure, path)


def _draw_methods(axes: Axes, scores: Scores, kind: str) -> None:
    names = list(METHODS)
    for shift, suffix, label in ((-0.2, "", "default"), (0.2, " tuned", "tuned on validation")):
        shown = [i for i, name in enumerate(names) if scores.averages(kind, name + suffix)]
        if not shown:
            continue
        averages = [scores.averages(kind, names[i] + suffix) for i in shown]
        axes.bar(
            [i + shift for i in shown],
            [mean(values) for values in averages],
            width=0.4,
            yerr=[_spread(values) for values in averages],
            label=label,
        )
    base, experts = mean(scores.averages(kind, "base")), mean(scores.averages(kind, "experts"))
    axes.axhline(experts, color="black", linewidth=1, label="experts' own")
    axes.axhline(base, color="gray", linewidth=1, linestyle=":", label="base")
    axes.set_ylim(base - 3, experts + 7)
    axes.set_xticks(range(len(names)), [METHODS[name].title for name in names], rotation=20, ha="right")
    axes.set_title(TITLES[kind])
    axes.set_ylabel("test accuracy, %")
    axes.legend(fontsize=8, ncols=4, loc="upper center")


def _draw_sizes(axes: Axes, scores: Scores, kind: str) -> None:
    for name, method in METHODS.items():
        lost = []
        for size in scores.sizes:
            pairs = zip(scores.averages(kind, "experts", size), scores.averages(kind, name, size), strict=True)
            lost.append([expert - merged for expert, merged in pairs])
        axes.errorbar(
            scores.sizes,
            [mean(values) for values in lost],
            yerr=[_spread(values) for values in lost],
            label=method.title,
            capsize=2,
            linewidth=3 if name == OURS else 1.2,
        )
    axes.set_xticks(scores.sizes)
    axes.set_xlabel("merged experts, each method at its default")
    axes.set_ylabel("points below the experts' own")
    axes.legend(fontsize=8)


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
