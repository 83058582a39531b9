"""The command line: ``neuromerge merge``, ``plan``, ``card``, ``push`` and ``compare``.

The commands import what they need when they are called, so that ``--help`` answers at once.
"""

import atexit
import gc
from typing import Annotated

import typer

from neuromerge_hf.cli.common import exit_on_signals
from neuromerge_hf.cli.compare import compare_command
from neuromerge_hf.cli.failures import FLAG, Commands
from neuromerge_hf.cli.merge import merge_command
from neuromerge_hf.cli.plan import plan_command
from neuromerge_hf.cli.publish import card_command, push_command
from neuromerge_hf.version import __version__

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("merge")(merge_command)
app.command("plan")(plan_command)
app.command("card")(card_command)
app.command("push")(push_command)
app.command("compare")(compare_command)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"neuromerge {__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    traceback: Annotated[bool, typer.Option(FLAG, help="Show where in the code an error came up.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Merge fine-tunes of one base model by NeuroMerging."""
    # Importing torch and transformers creates millions of permanent objects. Searching them for garbage takes a second,
    # and a merge leaves no garbage.
    gc.disable()
    context.call_on_close(gc.enable)
    atexit.register(gc.freeze)  # Python searches them a last time when it ends, unless they are frozen
    context.with_resource(exit_on_signals())
