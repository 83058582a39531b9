"""How task vectors are trimmed: the rank of a threshold, and the threshold with its effects."""

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Trimming:
    """How one expert's task vector is trimmed.

    Attributes:
        threshold: entries with a smaller magnitude become 0.
        sigma: the share of the task vector's L1 norm that is trimmed.
        entries: the number of entries of the task vector, over all parameters that the expert may change.
        trimmed: the number of entries that become 0.
    """

    threshold: float
    sigma: float
    entries: int
    trimmed: int = 0


@dataclass(frozen=True)
class Rank:
    """The rank of a value: the `number`-th smallest value of one expert, counted from 1. Number 0 stands for 0.0."""

    expert: int
    number: int


def trim_rank(entries: int, density: float) -> int:
    """Return j = floor((1 - density) * entries), computed exactly from the decimal number that the user wrote."""
    return math.floor((1 - Fraction(repr(density))) * entries)
