"""``neuromerge merge``."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neuromerge_hf.cli.common import check_output_early, echo, is_recipe, merge_options, models_or_file, runtime_options
from neuromerge_hf.cli.messages import say
from neuromerge_hf.cli.options import ConfigFile, Method, Models, takes_options
from neuromerge_hf.errors import MergeError

if TYPE_CHECKING:
    from neuromerge_hf.folder.report import MergeReport


@takes_options(methods=True)
def merge_command(
    context: typer.Context,
    models: Models = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to write.", show_default=False)],
    method: Method = None,
    config: ConfigFile = None,
    tune: Annotated[
        str | None,
        typer.Option(help="module:function that scores a model: tune the lambdas with it.", show_default=False),
    ] = None,
    tune_density: Annotated[
        list[float] | None, typer.Option(help="A density to try as well. Repeatable.", show_default="--density alone")
    ] = None,
    **options: Any,
) -> None:
    """Merge fine-tunes and adapters into their base, or reproduce a merge from its recipe."""
    models = models_or_file(models, config)
    check_output_early(output, options["overwrite"])
    say("Loading torch and transformers")
    from neuromerge_hf.api import merge, merge_recipe  # imports torch, which takes seconds

    if tune_density and not tune:
        raise MergeError("--tune-density says what to try: give --tune module:function to score it.")
    if is_recipe(context, models):
        report = merge_recipe(models[0], output, **runtime_options(context))
    elif tune:
        report = _tuned(models, output, tune, tune_density, merge_options(context))
    else:
        report = merge(models, output, **merge_options(context))
    if context.find_root().params["quiet"]:
        typer.echo(report.output_dir)
        return
    echo(report, as_json=False)
    folder = shlex.quote(str(output))
    typer.echo(f"\nNext:\n  neuromerge card {folder} --results results.json\n  neuromerge push {folder} OWNER/NAME")


def _tuned(
    models: list[str], output: Path, tune: str, densities: list[float] | None, options: dict[str, Any]
) -> "MergeReport":
    from neuromerge_hf.tuning.evaluation import load_function
    from neuromerge_hf.tuning.trials import to_markdown
    from neuromerge_hf.tuning.tune import tune_lambdas

    evaluate = load_function(tune)
    options["tuned_on"] = options["tuned_on"] or tune
    found = tune_lambdas(models, evaluate, densities=densities, output_dir=output, **options)
    typer.echo(to_markdown(found.trials, found.best))
    assert found.report is not None, "there is an output directory"
    return found.report
