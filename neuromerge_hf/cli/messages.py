"""What the command line says while it works and when it has finished."""

import logging
import re
import shutil
import sys
import textwrap
from collections.abc import Callable

import typer

LIBRARY = logging.getLogger("neuromerge_hf")

OTHERS = ("transformers", "peft", "accelerate", "huggingface_hub")
"""The libraries whose messages ``--verbose`` shows as well."""

COMMAND = re.compile(r"^\s*neuromerge |To resume: ")
"""A line with a command to copy, which is not broken."""


class _Handler(logging.Handler):
    """Writes messages to stderr, whatever that is at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        label = f"{record.levelname.capitalize()}: " if record.levelno >= logging.WARNING else ""
        typer.echo(fitted(f"{label}{record.getMessage()}", sys.stderr.isatty()), err=True)


def show_messages(quiet: bool, verbose: bool) -> Callable[[], None]:
    """Show the library's warnings on stderr, and in a terminal what it does; return a function that ends this.

    Args:
        quiet: whether to show nothing but errors, and no progress bars.
        verbose: whether to show all its messages, and those of the libraries below.
    """
    handler = _Handler()
    levels = {LIBRARY: logging.ERROR if quiet else logging.INFO if sys.stderr.isatty() else logging.WARNING}
    if verbose:
        levels |= {LIBRARY: logging.DEBUG, **{logging.getLogger(name): logging.INFO for name in OTHERS}}
    before = {logger: logger.level for logger in levels}
    for logger, level in levels.items():
        logger.addHandler(handler)
        logger.setLevel(level)
    if quiet:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()

    def end() -> None:
        for logger, level in before.items():
            logger.removeHandler(handler)
            logger.setLevel(level)
        if quiet:
            from huggingface_hub.utils.tqdm import enable_progress_bars

            enable_progress_bars()

    return end


def say(message: str) -> None:
    """Say what is done now."""
    LIBRARY.info(message)


def fitted(text: str, is_terminal: bool) -> str:
    """Break the lines of a text between words where a terminal would break them anywhere."""
    if not is_terminal:
        return text
    width = shutil.get_terminal_size().columns
    return "\n".join(_wrapped(line, width) for line in text.splitlines())


def _wrapped(line: str, width: int) -> str:
    if len(line) <= width or COMMAND.search(line):
        return line
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.fill(
        line.strip(),
        width,
        initial_indent=indent,
        subsequent_indent=indent + "  " * bool(indent),
        break_long_words=False,
        break_on_hyphens=False,
    )
