"""How the command line ends if a command fails: one message, and an exit code that says whose fault it is."""

import errno
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from neuromerge_hf.cli.messages import fitted
from neuromerge_hf.errors import MergeError, printable

FLAG = "--traceback"

GLOBAL = {FLAG: FLAG, "--quiet": "--quiet", "-q": "--quiet", "--verbose": "--verbose", "-v": "--verbose"}
"""Options of all commands, which are accepted anywhere in a command line, and their long forms."""

INPUT, OURS, INTERRUPTED, BROKEN_PIPE = 1, 70, 130, 141
"""Exit codes: an error in what was given, or of the machine; an error of this library (EX_SOFTWARE); 128 + SIGINT;
128 + SIGPIPE. Wrong usage exits with 2, as everywhere."""


class Commands(TyperGroup):
    """The commands. What they raise becomes one message on stderr, which ``--traceback`` extends."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Accept the options of all commands anywhere before a ``--``."""
        end = args.index("--") if "--" in args else len(args)
        given = [GLOBAL[each] for each in args[:end] if each in GLOBAL]
        args = [*dict.fromkeys(given), *(each for each in args[:end] if each not in GLOBAL), *args[end:]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        with _failures_explained(show_traceback=bool(ctx.params.get("traceback"))):
            return super().invoke(ctx)


@contextmanager
def _failures_explained(show_traceback: bool) -> Iterator[None]:
    try:
        yield
    except (MergeError, OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            _forget_output()
            raise typer.Exit(BROKEN_PIPE) from None
        _explain(error, [f"Error: {_message(error)}"], show_traceback)
        raise typer.Exit(INPUT) from None
    except KeyboardInterrupt as error:
        _explain(error, ["Interrupted."], show_traceback)
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):  # usage, and typer's own ways to end
            raise
        what = f"Error: {type(error).__name__}: {printable(error)}"
        hint = "" if show_traceback else f"; run again with {FLAG} and report it"
        _explain(error, [f"{what}. This is a fault of neuromerge_hf{hint}."], show_traceback)
        raise typer.Exit(OURS) from None


def _message(error: Exception) -> str:
    if isinstance(error, MergeError):
        return str(error)
    if isinstance(error, MemoryError):
        return "There is not enough memory. Close other programs, or use fewer --threads."
    return f"{printable(error)}. Run again with {FLAG} to see where."


def _explain(error: BaseException, lines: Sequence[str], show_traceback: bool) -> None:
    if show_traceback:
        typer.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    for line in lines:
        typer.echo(fitted(line, sys.stderr.isatty()), err=True)


def _forget_output() -> None:
    """Let nothing be written any more to a pipe that nobody reads: Python flushes its buffers when it exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
