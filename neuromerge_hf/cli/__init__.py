"""The command line: ``neuromerge merge``, ``plan``, ``card``, ``push``, ``compare`` and ``cache``.

The commands import what they need when they are called, so that ``--help`` answers at once.
"""

import atexit
import gc
from typing import Annotated

import typer

from neuromerge_hf.cli.cache import app as cache_app
from neuromerge_hf.cli.common import exit_on_signals
from neuromerge_hf.cli.compare import compare_command
from neuromerge_hf.cli.failures import FLAG, Commands
from neuromerge_hf.cli.inspect import inspect_command
from neuromerge_hf.cli.merge import merge_command
from neuromerge_hf.cli.messages import show_messages
from neuromerge_hf.cli.plan import plan_command
from neuromerge_hf.cli.publish import card_command, push_command
from neuromerge_hf.version import __version__

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, command, example in (
    ("merge", merge_command, "merge me/math me/code-lora --base-model org/base -o merged"),
    ("plan", plan_command, "plan me/math me/code-lora --base-model org/base"),
    ("inspect", inspect_command, "inspect me/math me/code-lora --base-model org/base --html page.html"),
    ("card", card_command, "card merged --results results.json"),
    ("push", push_command, "push merged me/merged"),
    ("compare", compare_command, "compare me/math me/code-lora --base-model org/base --eval score.py:score"),
):
    app.command(name, epilog=f"Example: neuromerge {example}")(command)
app.add_typer(cache_app, name="cache")


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"neuromerge {__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    traceback: Annotated[bool, typer.Option(FLAG, help="Show where in the code an error came up.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but what went wrong.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the messages of other libraries, too.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Merge fine-tuned transformers models and LoRA adapters into a single model that handles all their tasks."""
    if quiet and verbose:
        raise typer.BadParameter("Say --quiet or --verbose, and not both.")
    # Importing torch and transformers creates millions of permanent objects. Searching them for garbage takes a second,
    # and a merge leaves no garbage.
    gc.disable()
    context.call_on_close(gc.enable)
    atexit.register(gc.freeze)  # Python searches them a last time when it ends, unless they are frozen
    context.with_resource(exit_on_signals())
    context.call_on_close(show_messages(quiet, verbose))
