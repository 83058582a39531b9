"""The command line: ``neuromerge merge``."""

import gc
from pathlib import Path
from typing import Annotated, Any

import typer

IN_RECIPE = (
    "base_model",
    "density",
    "lambda_parallel",
    "lambda_orthogonal",
    "exclude",
    "dtype",
    "tokenizer",
    "chat_template",
    "merge_heads",
    "max_shard_size",
)
"""The options that a recipe holds."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main(context: typer.Context) -> None:
    """Merge fine-tunes of one base model by NeuroMerging."""
    # Loading torch and transformers makes millions of objects that stay. Looking through them again and again for
    # garbage takes a second, and a merge leaves none.
    gc.disable()
    context.call_on_close(gc.enable)


@app.command("merge")
def merge_command(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(
            help="The experts: folders or ids on the Hub (id@revision). Or one recipe.yaml.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option(help="The directory to write.", show_default=False)],
    base_model: Annotated[
        str | None, typer.Option(help="The model they were fine-tuned from.", show_default="the adapters' own")
    ] = None,
    density: Annotated[float, typer.Option(help="The fraction of each task vector that is kept.")] = 0.2,
    lambda_parallel: Annotated[float, typer.Option(help="The weight of the parallel part, lambda_1.")] = 0.0,
    lambda_orthogonal: Annotated[str, typer.Option(help="The weight of the orthogonal part, lambda_2.")] = "auto",
    exclude: Annotated[
        list[str] | None, typer.Option(help="A pattern of parameters that stay the base's. Repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16, or auto: the base's.")] = "auto",
    tokenizer: Annotated[str, typer.Option(help="base, an expert's name or id, or union.")] = "base",
    chat_template: Annotated[
        str | None, typer.Option(help="base, or an expert's name or id.", show_default="the tokenizer's")
    ] = None,
    merge_heads: Annotated[
        bool, typer.Option("--merge-heads", help="Take the mean of heads that the base lacks.")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="The largest size of a weight file.")] = "5GB",
    device: Annotated[
        str | None, typer.Option(help="Where to compute.", show_default="the accelerator, or cpu")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="How many threads.", show_default="all processors")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a directory that is not empty.")] = False,
    token: Annotated[str | None, typer.Option(help="For private and gated models.", envvar="HF_TOKEN")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code from the repositories.")
    ] = False,
) -> None:
    """Merge fine-tunes and adapters into their base, or make a model again from its recipe."""
    from neuromerge_hf.config import NeuroMergingConfig
    from neuromerge_hf.errors import MergeError
    from neuromerge_hf.merging import merge, merge_recipe

    try:
        if len(models) == 1 and models[0].endswith((".yaml", ".yml")):
            sources = {name: context.get_parameter_source(name) for name in IN_RECIPE}
            given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
            if given:
                options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
                raise MergeError(f"The recipe {models[0]} says this itself: leave {options} out.")
            report = merge_recipe(
                models[0],
                output,
                device=device,
                threads=threads,
                overwrite=overwrite,
                token=token,
                trust_remote_code=trust_remote_code,
            )
        else:
            config = NeuroMergingConfig(
                density=density,
                lambda_parallel=lambda_parallel,
                lambda_orthogonal=_number_or_auto(lambda_orthogonal),
                exclude=tuple(exclude or ()),
            )
            report = merge(
                models,
                output,
                base_model=base_model,
                config=config,
                dtype=dtype,
                tokenizer=tokenizer,
                chat_template=chat_template,
                merge_heads=merge_heads,
                max_shard_size=max_shard_size,
                device=device,
                threads=threads,
                overwrite=overwrite,
                token=token,
                trust_remote_code=trust_remote_code,
            )
    except MergeError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(report)


def _number_or_auto(value: str) -> Any:
    try:
        return float(value)
    except ValueError:
        return value  # the config says what is wrong, unless it is "auto"
