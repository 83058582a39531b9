"""The one exception that users see."""

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

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


class Problems:
    """Everything that is wrong with several steps, to be reported at once.

    ``with problems:`` notes a `MergeError` of the block and goes on after it.
    """

    def __init__(self) -> None:
        self._found: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if isinstance(error, MergeError):
            self.add(error.problems)
        return isinstance(error, MergeError)

    def add(self, problems: Sequence[str]) -> None:
        """Note problems."""
        self._found += problems

    def attempt(self, step: Callable[[], T]) -> T | None:
        """The result of a step, or None if it raised a `MergeError`, which is noted."""
        try:
            return step()
        except MergeError as error:
            self._found += error.problems
            return None

    def report(self) -> None:
        """Raise what was noted, as one `MergeError`."""
        if self._found:
            raise self.error

    @property
    def error(self) -> MergeError:
        """What was noted, as one `MergeError`."""
        return MergeError(self._found)
