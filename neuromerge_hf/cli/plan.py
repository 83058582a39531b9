"""``neuromerge plan``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from neuromerge_hf.cli.common import echo, is_recipe, merge_options, models_or_file, runtime_options
from neuromerge_hf.cli.messages import say
from neuromerge_hf.cli.options import JSON, ConfigFile, Method, Models, takes_options


@takes_options(methods=True)
def plan_command(
    context: typer.Context,
    models: Models = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The directory that the merge will write, to check it as well."),
    ] = None,
    method: Method = None,
    config: ConfigFile = None,
    as_json: JSON = False,
    **options: Any,
) -> None:
    """Show what a merge will do and need, or everything that is wrong with it, without downloading the weights."""
    models = models_or_file(models, config)
    say("Loading torch and transformers")
    from neuromerge_hf.api import plan_merge, plan_recipe

    if is_recipe(context, models):
        plan = plan_recipe(models[0], output_dir=output, **runtime_options(context))
    else:
        plan = plan_merge(models, output_dir=output, **merge_options(context))
    echo(plan, as_json)
