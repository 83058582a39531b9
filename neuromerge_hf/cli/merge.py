"""``neuromerge merge``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neuromerge_hf.cli.common import errors_in_a_sentence, is_recipe, method_config
from neuromerge_hf.cli.options import (
    BaseModel,
    ChatTemplate,
    Density,
    DropRate,
    Dtype,
    Exclude,
    LambdaOrthogonal,
    LambdaParallel,
    MergeHeads,
    Method,
    Models,
    Overwrite,
    Scale,
    Seed,
    Threads,
    Token,
    Tokenizer,
    TrustRemoteCode,
    Tune,
    TuneDensity,
)

if TYPE_CHECKING:
    from neuromerge_hf.folder.report import MergeReport


def merge_command(
    context: typer.Context,
    models: Models,
    output: Annotated[Path, typer.Option(help="The directory to write.", show_default=False)],
    base_model: BaseModel = None,
    method: Method = "neuromerging",
    density: Density = None,
    lambda_parallel: LambdaParallel = None,
    lambda_orthogonal: LambdaOrthogonal = None,
    scale: Scale = None,
    drop_rate: DropRate = None,
    seed: Seed = None,
    exclude: Exclude = None,
    tune: Tune = None,
    tune_density: TuneDensity = None,
    dtype: Dtype = "auto",
    tokenizer: Tokenizer = "base",
    chat_template: ChatTemplate = None,
    merge_heads: MergeHeads = False,
    max_shard_size: Annotated[str, typer.Option(help="The largest size of a weight file.")] = "5GB",
    device: Annotated[
        str | None, typer.Option(help="Where to compute.", show_default="the accelerator, or cpu")
    ] = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    token: Token = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Merge fine-tunes and adapters into their base, or make a model again from its recipe."""
    from neuromerge_hf.api import merge, merge_recipe
    from neuromerge_hf.errors import MergeError

    with errors_in_a_sentence():
        if tune_density and not tune:
            raise MergeError("--tune-density says what to try: give --tune module:function to score it.")
        if is_recipe(context, models):
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
            settings: dict[str, Any] = {
                "base_model": base_model,
                "config": method_config(context),
                "dtype": dtype,
                "tokenizer": tokenizer,
                "chat_template": chat_template,
                "merge_heads": merge_heads,
                "max_shard_size": max_shard_size,
                "device": device,
                "threads": threads,
                "overwrite": overwrite,
                "token": token,
                "trust_remote_code": trust_remote_code,
            }
            report = _tuned(models, output, tune, tune_density, settings) if tune else merge(models, output, **settings)
        typer.echo(report)


def _tuned(
    models: list[str], output: Path, tune: str, densities: list[float] | None, settings: dict[str, Any]
) -> "MergeReport":
    from neuromerge_hf.tuning.evaluation import load_function
    from neuromerge_hf.tuning.trials import to_markdown
    from neuromerge_hf.tuning.tune import tune_lambdas

    evaluate = load_function(tune)
    found = tune_lambdas(models, evaluate, densities=densities, tuned_on=tune, output_dir=output, **settings)
    typer.echo(to_markdown(found.trials, found.best))
    assert found.report is not None, "there is an output directory"
    return found.report
