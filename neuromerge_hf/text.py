"""Numbers, sizes and names in words."""

from collections.abc import Sequence

from neuromerge_hf.errors import LISTED


def different_names(base: str, experts: list[str]) -> list[str]:
    """The names of the base and of the experts, that of the base with an ending if an expert has it too."""
    while base in experts:
        base += "-base"
    return [base, *experts]


def readable_size(count: float) -> str:
    """A number of bytes with three digits: "1.24 GB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def counted(parameters: int) -> str:
    """A number of parameters: "1 parameter"."""
    return "1 parameter" if parameters == 1 else f"{parameters} parameters"


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
