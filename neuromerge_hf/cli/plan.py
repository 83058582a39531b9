"""``neuromerge plan``."""

from pathlib import Path
from typing import Annotated, Any

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
)


def plan_command(
    context: typer.Context,
    models: Models,
    base_model: BaseModel = None,
    output: Annotated[
        Path | None, typer.Option(help="The directory that the merge shall write, to be checked as well.")
    ] = None,
    method: Method = "neuromerging",
    density: Density = None,
    lambda_parallel: LambdaParallel = None,
    lambda_orthogonal: LambdaOrthogonal = None,
    scale: Scale = None,
    drop_rate: DropRate = None,
    seed: Seed = None,
    exclude: Exclude = None,
    dtype: Dtype = "auto",
    tokenizer: Tokenizer = "base",
    chat_template: ChatTemplate = None,
    merge_heads: MergeHeads = False,
    threads: Threads = None,
    overwrite: Overwrite = False,
    token: Token = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Say what a merge will do and need, or everything that is wrong with it, without downloading the weights."""
    from neuromerge_hf.folder.recipe import load_recipe
    from neuromerge_hf.planning.planner import plan_merge

    with errors_in_a_sentence():
        settings: dict[str, Any] = {
            "models": models,
            "base_model": base_model,
            "config": method_config(context),
            "dtype": dtype,
            "tokenizer": tokenizer,
            "chat_template": chat_template,
            "merge_heads": merge_heads,
        }
        if is_recipe(context, models):
            recipe = load_recipe(Path(models[0]))
            settings = {name: getattr(recipe, name) for name in settings}
            settings["models"] = [model.reference for model in recipe.models]
            settings["base_model"] = recipe.base_model.reference
        plan = plan_merge(
            **settings,
            output_dir=output,
            threads=threads,
            overwrite=overwrite,
            token=token,
            trust_remote_code=trust_remote_code,
        )
        typer.echo(plan)
