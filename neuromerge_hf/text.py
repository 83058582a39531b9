"""Functions that write numbers, sizes and names for people to read."""

import re
from collections.abc import Sequence

from neuromerge_hf.errors import LISTED

NUMBER = re.compile(r"(-?[\d.,]+(%| ?[kMG]?B)?)?")
"""A number, a share or a size; or nothing."""


def different_names(base: str, experts: list[str]) -> list[str]:
    """Return distinct names of the base and the experts. The base's name gets an ending if an expert has the same."""
    while base in experts:
        base += "-base"
    return [base, *experts]


def readable_size(count: float) -> str:
    """Return a number of bytes with three digits: "1.24 GB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def decimal(value: float, digits: int) -> str:
    """Return a number with some digits after the point, and no sign if they are all 0."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def percent(share: float, digits: int = 0) -> str:
    """Return a share in percent: "12%"."""
    return f"{decimal(100 * share, digits)}%"


def kind_of(parameter: str) -> str:
    """The kind of a parameter: its name with ``*`` for numbers, such as ``model.layers.*.mlp.up_proj.weight``."""
    return ".".join("*" if name.isdecimal() else name for name in parameter.split("."))


def counted(parameters: int) -> str:
    """Return a number of parameters with its noun: "1 parameter"."""
    return "1 parameter" if parameters == 1 else f"{parameters} parameters"


def listed(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are: "a, b, c and 2 more"."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose first row is its header. Columns are to the left, but those of numbers.

    Columns that are empty in all rows but the header are left out.
    """
    header, *body = rows
    columns = [column for column in zip(header, *body, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(NUMBER.fullmatch(cell) for cell in column[1:]) for column in columns]
    lines = []
    for row in zip(*columns, strict=True):
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


class Summary:
    """The base class of what `str` summarises. `repr` is one line of it, and notebooks show all."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {str(self).partition(chr(10))[0].rstrip(':')}>"

    def _repr_markdown_(self) -> str:
        return f"```\n{self}\n```"
