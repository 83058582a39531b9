"""The exception that users see, and a collector of problems."""

import unicodedata
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

LISTED = 3
"""How many problems of one model an error lists. A wrong base has a problem in every layer."""


INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn")
"""The Unicode categories of characters that are invisible, or that change the text around them or the terminal."""


class Printable(str):
    """A text that may be shown as it is, with its line breaks."""


def printable(text: object) -> Printable:
    """Return a text on one line, with escapes in place of characters that act on a terminal or cannot be seen.

    Texts from models (names, tokens, messages of libraries about them) can hold anything. A `MergeError` and a text
    that is `Printable` already keep their lines.
    """
    if isinstance(text, Printable | MergeError):
        return Printable(text)
    return Printable("".join(map(_shown, str(text))))


def _shown(letter: str) -> str:
    if " " <= letter <= "~":
        return letter
    if letter.isspace() and letter not in "\x1c\x1d\x1e\x1f":
        return " "
    return ascii(letter)[1:-1] if unicodedata.category(letter) in INVISIBLE else letter


class MergeError(ValueError):
    """The models cannot be merged. The message names both sides, the file, and what to do.

    Attributes:
        problems: all problems that were found, in one or two sentences each.

    Examples:
        >>> try:
        ...     merge(["./missing", "math"], "merged")
        ... except MergeError as error:
        ...     print(error.problems[0])
        ./missing is not a folder on this machine, and no id of a model on the Hub.
    """

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [*map(printable, [problems] if isinstance(problems, str) else problems)]
        if len(self.problems) == 1:
            message: str = self.problems[0]
        else:
            message = "\n".join([f"{len(self.problems)} problems were found:", *(f"  * {p}" for p in self.problems)])
        super().__init__(message)


def abridged(problems: Sequence[str]) -> list[str]:
    """Return the first problems of one model, and a line that counts the others."""
    more = len(problems) - LISTED
    return [*problems[:LISTED], f"... and {more} more of the same model."] if more > 1 else list(problems)


class Problems:
    """Collects the problems of several steps, so that one error reports them all.

    ``with problems:`` records a `MergeError` that the block raises, and goes on after the block.
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
        """Record problems."""
        self._found += problems

    def attempt(self, step: Callable[[], T]) -> T | None:
        """Return the result of a step, or record its `MergeError` and return None."""
        try:
            return step()
        except MergeError as error:
            self._found += error.problems
            return None

    def report(self) -> None:
        """Raise the recorded problems as one `MergeError`, if there are any."""
        if self._found:
            raise self.error

    @property
    def error(self) -> MergeError:
        """The recorded problems, as one `MergeError`."""
        return MergeError(self._found)
