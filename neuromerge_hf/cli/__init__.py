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

app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command("merge")(merge_command)
app.command("plan")(plan_command)
app.command("card")(card_command)
app.command("push")(push_command)
app.command("compare")(compare_command)


@app.callback()
def main(
    context: typer.Context,
    traceback: Annotated[bool, typer.Option(FLAG, help="Show where in the code an error came up.")] = False,
) -> None:
    """Merge fine-tunes of one base model by NeuroMerging."""
    # Importing torch and transformers creates millions of permanent objects. Searching them for garbage takes a second,
    # and a merge leaves no garbage.
    gc.disable()
    context.call_on_close(gc.enable)
    atexit.register(gc.freeze)  # Python searches them a last time when it ends, unless they are frozen
    context.with_resource(exit_on_signals())
