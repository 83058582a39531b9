"""The axis of a picture that shows a model's layers."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from neuromerge_hf.folder.diagnostics import LayerDiagnostics

if TYPE_CHECKING:  # matplotlib is loaded only where something is drawn
    from matplotlib.axes import Axes

LAYER_LETTERS = 14  # shown of a layer's name
GAP = 0.7  # between a list of blocks and other layers, in columns
LETTER = 0.07  # the width of a letter in inches


def _sections(layers: Sequence[LayerDiagnostics]) -> list[list[int]]:
    """The layers' indices, grouped by their list of blocks. A layer outside such a list is a group of its own."""
    keys = [_split(layer.name) for layer in layers]
    groups = groupby(range(len(layers)), key=lambda i: keys[i][0] if keys[i][1] else layers[i].name)
    return [list(group) for _, group in groups]


def _split(name: str) -> tuple[str, str]:
    """The name of a layer's list of blocks, and its number there, which is empty for a layer outside such a list."""
    blocks, _, number = name.rpartition(".")
    return (blocks, number) if number.isdecimal() else (name, "")


def positions_of(layers: Sequence[LayerDiagnostics], width: float) -> list[float]:
    """The x coordinate of each layer, in columns. A gap between sections leaves room for two names."""
    gap = max(GAP, 2.5 * LETTER * len(layers) / width - 1)
    return [i + gap * number for number, section in enumerate(_sections(layers)) for i in section]


def label_layers(axes: "Axes", layers: Sequence[LayerDiagnostics], positions: Sequence[float], unit: float) -> None:
    """Label blocks by number and by their list's name, and other layers by name. A column is `unit` inches wide."""
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
            ticks.append((middle, f"\n{legible(label, len(label))}", {}))
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
    name = legible(".".join(path[-2:] if path[-1].isdecimal() else path[-1:]), len(layer))
    return name if len(name) <= LAYER_LETTERS else "…" + name[1 - LAYER_LETTERS :]


def legible(name: str, letters: int) -> str:
    """The name, cut to a number of letters, with "?" for each that the font lacks."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    text = "".join(c if c.isprintable() and font.get_char_index(ord(c)) else "?" for c in name)
    return text if len(text) <= letters else text[: letters - 1] + "…"
