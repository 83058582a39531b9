"""The picture of a model card: how good the merge is, and where each expert changed the model.

It is drawn with matplotlib's objects alone, without a window system or lasting global state. Sizes are in inches, and a
card shows the width of 8 inches with about 800 pixels.
"""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuromerge_hf.folder.diagnostics import Diagnostics
from neuromerge_hf.folder.results import Comparison, Result, comparisons
from neuromerge_hf.model_cards.layer_axis import label_layers, legible, positions_of
from neuromerge_hf.storage.writing import write_file
from neuromerge_hf.text import percent

if TYPE_CHECKING:  # matplotlib is loaded only where something is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "neuromerge.png"
"""The name of the picture's file, which lies beside README.md."""

MERGED, OTHER = "#0072B2", "#D55E00"
"""Two colours that people with colour blindness can tell apart (Okabe and Ito)."""

UNCHANGED = "#F6F2EA"

WIDTH = 8.0
LEFT = 2.3  # the column of names
RIGHT = 0.75  # the key of the colours
ROW = 0.34
TICKS = 1.1  # below the layers
TITLE = 0.55  # above a panel
LETTERS = 32  # of a line of a name
ROWS = 16  # shown of many tasks


def draw(diagnostics: Diagnostics, results: Sequence[Result], path: Path) -> None:
    """Write the picture of a merge as a PNG. The same numbers give the same bytes.

    The upper panel shows the scores that can be compared, or without them how much the merge keeps of each expert's
    change. The lower one shows how much each expert changed each layer.
    """
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    with matplotlib.style.context("default"):  # the user's own settings must not change the picture
        scores = [each for each in comparisons(results) if each.retained is not None][:ROWS]
        layers = [layer for layer in diagnostics.layers if layer.relative_norms]
        top = ROW * max(1, len(scores) or len(diagnostics.experts)) + 0.35
        heat = ROW * len(diagnostics.experts)
        below = TICKS + heat + TITLE if layers else 0.1
        figure = Figure(figsize=(WIDTH, below + top + TITLE), dpi=160, facecolor="white")
        canvas = FigureCanvasAgg(figure)
        width = WIDTH - LEFT - RIGHT
        upper = _axes(figure, LEFT, below + 0.3, width, top - 0.3)
        if scores:
            _draw_scores(upper, scores)
        else:
            _draw_kept(upper, diagnostics)
        if layers:
            positions = positions_of(layers, width)
            panel = _axes(figure, LEFT, TICKS, width, heat)
            key = _axes(figure, WIDTH - RIGHT + 0.12, TICKS, 0.12, max(heat, 0.6))
            _draw_heat(panel, key, diagnostics, [layer.relative_norms for layer in layers], positions)
            label_layers(panel, layers, positions, width / (positions[-1] + 1))
        canvas.draw()
        image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
    # A palette makes the file a third as large without a visible difference. This is the fastest of Pillow's methods
    # that keeps white pixels white.
    buffer = io.BytesIO()
    image.quantize(128, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(buffer, format="png")
    write_file(path, buffer.getvalue())


def _axes(figure: "Figure", left: float, bottom: float, width: float, height: float) -> "Axes":
    w, h = figure.get_size_inches()
    axes = figure.add_axes((left / w, bottom / h, width / w, height / h))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, length=2)
    return axes


def _draw_bars(
    axes: "Axes", names: Sequence[str], shares: Sequence[float], labels: Sequence[str], largest: float
) -> None:
    """Draw a bar for each share, with its label, on an axis that ends at `largest` percent."""
    rows = range(len(names))
    axes.set_xlim(min(0.0, 110 * min(shares)), largest)
    axes.barh(rows, [100 * share for share in shares], height=0.6, color=MERGED)
    for row, (share, label) in enumerate(zip(shares, labels, strict=True)):
        inside = 100 * share > 0.2 * largest
        place: dict[str, Any] = {"ha": "right", "color": "white"} if inside else {"ha": "left", "color": "black"}
        x = 100 * max(share, 0.0) + (-0.01 if inside else 0.01) * largest
        axes.text(x, row, label, va="center", fontsize=8, **place)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(rows, [_wrapped(name) for name in names], parse_math=False, linespacing=0.95)
    axes.tick_params(axis="y", length=0)
    axes.axvline(0, linewidth=0.8, color="black")
    axes.spines["left"].set_visible(False)


def _wrapped(name: str) -> str:
    """A name on at most two lines."""
    lines = textwrap.wrap(legible(name, 2 * LETTERS), LETTERS, max_lines=2, placeholder="…")
    return "\n".join(lines)


def _draw_scores(axes: "Axes", scores: Sequence[Comparison]) -> None:
    """Draw each task's merged score as a share of the best expert's, and the base's as a mark."""
    shares = [each.retained or 0.0 for each in scores]
    labels = [f"{each.merged.value:.4g}" for each in scores]
    _draw_bars(axes, [each.task for each in scores], shares, labels, max(105, *(100 * share + 5 for share in shares)))
    bases = [(row, 100 * base) for row, each in enumerate(scores) if (base := each.share_of_base) is not None]
    if bases:
        rows, values = zip(*bases, strict=True)
        ends = [row - 0.38 for row in rows], [row + 0.38 for row in rows]
        axes.vlines(values, *ends, linewidth=2, color=OTHER, label="base")
    axes.axvline(100, linewidth=1.2, color="black", linestyle=":", label="expert")
    axes.legend(fontsize=8, ncols=2, frameon=False, loc="lower right", bbox_to_anchor=(1.01, 0.98), borderpad=0)
    axes.set_title("Score of the merged model, in % of the best expert's", fontsize=9, loc="left", pad=5)


def _draw_kept(axes: "Axes", diagnostics: Diagnostics) -> None:
    """Draw how much the merge keeps of each expert's change, and what a plain mean would keep."""
    shares = [expert.survival or 0.0 for expert in diagnostics.experts]
    labels = ["–" if expert.survival is None else percent(expert.survival) for expert in diagnostics.experts]
    _draw_bars(axes, [expert.name for expert in diagnostics.experts], shares, labels, max(100, 105 * max(shares)))
    label = "a plain mean of unrelated changes"
    axes.axvline(100 / len(shares), linewidth=1.2, color="black", linestyle=":", label=label)
    axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1.01, 0.98), borderpad=0)
    axes.set_title("Kept of each expert's change, %", fontsize=9, loc="left", pad=5)


def _draw_heat(
    axes: "Axes",
    key: "Axes",
    diagnostics: Diagnostics,
    norms: Sequence[Sequence[float | None]],
    positions: Sequence[float],
) -> None:
    """Draw the relative norm of each expert's change of each layer. What an expert does not change stays beige."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm
    from matplotlib.patches import Rectangle

    largest = max((norm for of_layer in norms for norm in of_layer if norm), default=1.0)
    scale = PowerNorm(0.5, 0, 100 * largest)  # so that layers still differ beside one that changes much more
    colours = matplotlib.colormaps["Blues"]
    for position, of_layer in zip(positions, norms, strict=True):
        for row, norm in enumerate(of_layer):
            colour = colours(scale(100 * norm)) if norm else UNCHANGED
            axes.add_patch(Rectangle((position - 0.5, row - 0.5), 1, 1, facecolor=colour, edgecolor="none"))
    axes.set_xlim(-0.5, positions[-1] + 0.5)
    axes.set_ylim(len(diagnostics.experts) - 0.5, -0.5)
    names = [legible(expert.name, LETTERS) for expert in diagnostics.experts]
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(ScalarMappable(scale, colours), cax=key)
    bar.outline.set_visible(False)
    title = "Change of each layer, as % of the base's weights" + (" (after trimming)" if diagnostics.elected else "")
    axes.set_title(title, fontsize=9, loc="left", pad=5)
