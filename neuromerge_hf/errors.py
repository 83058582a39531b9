"""The one exception that users see."""

from collections.abc import Sequence

LISTED = 3
"""How many problems of one model are spelled out: a wrong base is wrong in every layer."""


class MergeError(ValueError):
    """What was asked for cannot be merged. The message names both sides, the file, and what to do.

    Attributes:
        problems: everything that was found wrong, one sentence or two each.
    """

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        if len(self.problems) == 1:
            message = self.problems[0]
        else:
            message = "\n".join([f"{len(self.problems)} problems were found:", *(f"  * {p}" for p in self.problems)])
        super().__init__(message)


def abridged(problems: Sequence[str]) -> list[str]:
    """The first problems of one model, and how many more it has."""
    more = len(problems) - LISTED
    return [*problems[:LISTED], f"... and {more} more of the same model."] if more > 1 else list(problems)
