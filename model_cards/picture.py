"""The picture of a model card: the experts' cosines and norms, and the energy of their changes in each layer.

It is drawn with matplotlib's objects alone, without a window system or lasting global state. Sizes are in inches, and a
card shows the width of 8 inches with about 800 pixels.
"""

import io
import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuromerge_hf.folder.diagnostics import Diagnostics, LayerDiagnostics
from neuromerge_hf.storage.writing import write_file

if TYPE_CHECKING:  # matplotlib is loaded only where something is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "neuromerge.png"
"""The name of the picture's file, which lies beside README.md."""

PARALLEL, ORTHOGONAL = "#D55E00", "#0072B2"
"""Two colours that people with colour blindness can tell apart (Okabe and Ito)."""

WIDTH = 8.0
LEFT = 0.75
NAMES = 1.85  # the column of the experts' names
MATRIX = 3.0
ROW = 0.3
PANEL = 1.25
TICKS = 1.1  # below the lowest panel
LETTERS = 20  # shown of an expert's name
LAYER_LETTERS = 14  # shown of a layer's name
GAP = 0.7  # between a list of blocks and other layers, in bars
LETTER = 0.07  # the width of a letter


def draw(diagnostics: Diagnostics, path: Path) -> None:
    """Write the picture of a merge's diagnostics as a PNG. The same numbers give the same bytes."""
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    with matplotlib.style.context("default"):  # the user's own settings must not change the picture
        top = max(2, len(diagnostics.experts)) * ROW
        layers = [layer for layer in diagnostics.layers if layer.parallel is not None]
        below = TICKS + 2 * PANEL + 1.1 if layers else 0.1
        figure = Figure(figsize=(WIDTH, below + top + 0.5), dpi=160, facecolor="white")
        canvas = FigureCanvasAgg(figure)
        _draw_cosines(_axes(figure, NAMES, below, MATRIX, top), diagnostics)
        _draw_norms(_axes(figure, NAMES + MATRIX + 0.15, below, WIDTH - NAMES - MATRIX - 0.25, top), diagnostics)
        if layers:
            width = WIDTH - LEFT - 0.1
            positions = _positions(layers, width)
            panels = [_axes(figure, LEFT, TICKS + row * (PANEL + 0.6), width, PANEL) for row in (1, 0)]
            unit = width / (positions[-1] + 1.4)
            _draw_energy(panels[0], layers, positions, unit)
            _draw_conflicts(panels[1], layers, positions)
            for panel in panels:
                panel.set_xlim(-0.7, positions[-1] + 0.7)
                panel.set_xticks([])
            _label_layers(panels[1], layers, positions, unit)
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


def _draw_cosines(axes: "Axes", diagnostics: Diagnostics) -> None:
    count = len(diagnostics.experts)
    values = [[float("nan") if value is None else value for value in row] for row in diagnostics.cosines]
    axes.imshow(values, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for s, row in enumerate(diagnostics.cosines):
        for t, value in enumerate(row):
            colour = "white" if value is not None and abs(value) > 0.6 else "black"
            text = "–" if value is None else f"{value:.2f}".replace("-", "−")
            axes.text(t, s, text, ha="center", va="center", fontsize=7.5 if count < 8 else 6.5, color=colour)
    names = [f"{_legible(expert.name, LETTERS)}  {t}" for t, expert in enumerate(diagnostics.experts, start=1)]
    axes.set_yticks(range(count), names, parse_math=False)
    axes.set_xticks(range(count), [str(t) for t in range(1, count + 1)])
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set_title("Cosines between the experts' task vectors", fontsize=9, loc="left", pad=18)


def _draw_norms(axes: "Axes", diagnostics: Diagnostics) -> None:
    norms = [expert.relative_norm or 0.0 for expert in diagnostics.experts]
    longest = max(norms) or 1.0
    axes.barh(range(len(norms)), norms, height=0.6, color="#777777")
    for t, expert in enumerate(diagnostics.experts):
        kept = f", {expert.norm_kept:.0%} kept" if diagnostics.elected else ""
        axes.text(norms[t] + 0.03 * longest, t, f"{norms[t]:.2%}{kept}", va="center", fontsize=8)
    axes.set_xlim(0, 2.0 * longest)
    axes.set_ylim(len(norms) - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)
    trimmed = ",\nL1 norm kept by trimming" if diagnostics.elected else ""
    axes.set_title(f"Norm relative to the base's{trimmed}", fontsize=9, loc="left", pad=5)


def _draw_energy(axes: "Axes", layers: Sequence[LayerDiagnostics], positions: Sequence[float], unit: float) -> None:
    shares = [100 * (layer.parallel or 0.0) for layer in layers]
    axes.vlines(positions, 0, shares, linewidth=0.75 * unit * 72, color=PARALLEL)  # much faster than bars
    chances = [100 * (layer.parallel_by_chance or 0.0) for layer in layers]
    half = 0.45
    ends = [position - half for position in positions], [position + half for position in positions]
    axes.hlines(chances, *ends, linewidth=1.5, color="black", label="by chance")
    axes.set_ylim(0, max(1.1 * max(*shares, *chances), 0.01))
    axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1.01, 0.99), borderpad=0)
    axes.set_ylabel("%", fontsize=8)
    axes.set_title("Energy parallel to the base's neurons (the rest is orthogonal)", fontsize=9, loc="left", pad=5)


def _draw_conflicts(axes: "Axes", layers: Sequence[LayerDiagnostics], positions: Sequence[float]) -> None:
    for part, colour, marker in (("orthogonal", ORTHOGONAL, "o"), ("parallel", PARALLEL, "s")):
        for measure, style in (("conflicting", ":"), ("outvoted", "-")):
            label = {"conflicting": f"{part}, signs conflict", "outvoted": f"{part}, outvoted"}[measure]
            for number, section in enumerate(_sections(layers)):
                values = [getattr(layers[i], f"{measure}_{part}") for i in section]
                if measure == "outvoted" and all(value is None for value in values):
                    continue
                axes.plot(
                    [positions[i] for i in section],
                    [float("nan") if value is None else 100 * value for value in values],
                    style,
                    color=colour,
                    marker=marker,
                    markersize=3,
                    linewidth=1.2,
                    label=None if number else label,
                    markerfacecolor="white" if measure == "conflicting" else colour,
                )
    axes.set_ylim(0, 100)
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.set_ylabel("%", fontsize=8)
    axes.legend(fontsize=8, ncols=4, frameon=False, loc="lower left", bbox_to_anchor=(-0.01, 0.99), borderpad=0)
    axes.set_title("Energy in conflict", fontsize=9, loc="left", pad=20)


def _sections(layers: Sequence[LayerDiagnostics]) -> list[list[int]]:
    """The layers' indices, grouped by their list of blocks. A layer outside such a list is a group of its own."""
    keys = [_split(layer.name) for layer in layers]
    groups = groupby(range(len(layers)), key=lambda i: keys[i][0] if keys[i][1] else layers[i].name)
    return [list(group) for _, group in groups]


def _split(name: str) -> tuple[str, str]:
    """The name of a layer's list of blocks, and its number there, which is empty for a layer outside such a list."""
    blocks, _, number = name.rpartition(".")
    return (blocks, number) if number.isdecimal() else (name, "")


def _positions(layers: Sequence[LayerDiagnostics], width: float) -> list[float]:
    """The x coordinate of each layer, in bars. A gap between sections leaves room for two names."""
    gap = max(GAP, 2.5 * LETTER * len(layers) / width - 1)
    return [i + gap * number for number, section in enumerate(_sections(layers)) for i in section]


def _label_layers(axes: "Axes", layers: Sequence[LayerDiagnostics], positions: Sequence[float], unit: float) -> None:
    """Label blocks by number and by their list's name, and other layers by name. A bar is `unit` inches wide."""
    ticks: list[tuple[float, str, dict[str, Any]]] = []
    for section in _sections(layers):
        blocks, number = _split(layers[section[0]].name)
        path = blocks.split(".")
        ends = (".".join(path[start:]) for start in range(len(path)))
        label = next((end for end in ends if LETTER * len(end) < len(section) * unit), None)
        if number and label:
            step = next(step for step in (1, 2, 4, 8, 16, 32, 64, len(layers)) if step * unit > 3 * LETTER)
            ticks += [(positions[i], _split(layers[i].name)[1], {}) for i in section[::step]]
            middle = (positions[section[0]] + positions[section[-1]]) / 2
            ticks.append((middle, f"\n{_legible(label, len(label))}", {}))
        else:
            step = max(1, math.ceil(2 * LETTER / unit - 0.2))
            ticks += [(positions[i], _short(layers[i].name), {"rotation": 90}) for i in section[::step]]
    for position, text, options in ticks:
        axes.annotate(
            text,
            (position, 0),
            (0, -5),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8,
            parse_math=False,
            annotation_clip=False,
            **options,
        )


def _short(layer: str) -> str:
    """The end of a layer's name, such as "embed_tokens" or "convs.3"."""
    path = layer.split(".")
    name = _legible(".".join(path[-2:] if path[-1].isdecimal() else path[-1:]), len(layer))
    return name if len(name) <= LAYER_LETTERS else "…" + name[1 - LAYER_LETTERS :]


def _legible(name: str, letters: int) -> str:
    """The name, cut to a number of letters, with "?" for each that the font lacks."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    text = "".join(c if c.isprintable() and font.get_char_index(ord(c)) else "?" for c in name)
    return text if len(text) <= letters else text[: letters - 1] + "…"
