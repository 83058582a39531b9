"""``neuromerge inspect``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from neuromerge_hf.cli.common import echo, merge_options
from neuromerge_hf.cli.messages import say
from neuromerge_hf.cli.options import JSON, takes_options
from neuromerge_hf.errors import MergeError

NOT_INSPECTED = ("overwrite", "max_shard_size", "tuned_on")
"""The options of a merge that an inspection does not take."""


@takes_options(without=NOT_INSPECTED)
def inspect_command(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(help="The experts, as in merge; or the one folder that a merge wrote.", show_default=False),
    ],
    html: Annotated[
        Path | None, typer.Option(help="The file to write an interactive page to.", show_default="no page")
    ] = None,
    as_json: JSON = False,
    **options: Any,
) -> None:
    """Show what each expert changed and where they collide, before a merge or after it."""
    if html and (html.is_dir() or not html.parent.is_dir()):
        raise MergeError(f"--html {html} cannot be written: give a file in a folder that exists.")
    say("Loading torch and transformers")
    from neuromerge_hf.inspection import inspect_models

    if len(models) == 1 and options["base_model"] is None and (Path(models[0]) / "merge_report.json").is_file():
        found = inspect_models(models[0])
    else:
        known = {name: value for name, value in merge_options(context).items() if name != "config"}
        found = inspect_models(models, **known)
    echo(found, as_json)
    if html:
        typer.echo(f"\nThe page is in {found.save(html)}", err=as_json)
