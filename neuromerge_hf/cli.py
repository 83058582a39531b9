"""The command line: ``neuromerge merge``, ``plan``, ``card``, ``push`` and ``compare``."""

import dataclasses
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from neuromerge_hf.config import MergeConfig
    from neuromerge_hf.report import MergeReport

IN_RECIPE = (
    "base_model",
    "method",
    "density",
    "lambda_parallel",
    "lambda_orthogonal",
    "scale",
    "drop_rate",
    "seed",
    "tune",
    "tune_density",
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


Models = Annotated[
    list[str],
    typer.Argument(
        help="The experts: folders or ids on the Hub (owner/name, owner/name/folder, id@revision). Or one recipe.yaml.",
        show_default=False,
    ),
]
BaseModel = Annotated[
    str | None, typer.Option(help="The model they were fine-tuned from.", show_default="the adapters' own")
]
Method = Annotated[str, typer.Option(help="neuromerging, average, task_arithmetic, ties, dare_ties or pcb.")]
Density = Annotated[
    float | None,
    typer.Option(help="The fraction of each task vector that is kept.", show_default="0.2; of pcb, 0.1"),
]
LambdaParallel = Annotated[
    float | None, typer.Option(help="neuromerging: the weight of the parallel part, lambda_1.", show_default="0")
]
LambdaOrthogonal = Annotated[
    str | None, typer.Option(help="neuromerging: the weight of the orthogonal part, lambda_2.", show_default="auto")
]
Scale = Annotated[
    float | None,
    typer.Option(
        help="Other methods: the weight of the merged task vector.", show_default="1; of task_arithmetic, 0.4"
    ),
]
DropRate = Annotated[
    float | None, typer.Option(help="dare_ties: the share of entries dropped at random.", show_default="0.2")
]
Seed = Annotated[int | None, typer.Option(help="dare_ties: of the random numbers.", show_default="0")]
Exclude = Annotated[list[str] | None, typer.Option(help="A pattern of parameters that stay the base's. Repeatable.")]
Tune = Annotated[
    str | None,
    typer.Option(help="module:function that scores a model: choose the lambdas by it.", show_default=False),
]
TuneDensity = Annotated[
    list[float] | None, typer.Option(help="A density to try as well. Repeatable.", show_default="--density alone")
]
Dtype = Annotated[str, typer.Option(help="float32, float16, bfloat16, or auto: the base's.")]
Tokenizer = Annotated[str, typer.Option(help="base, an expert's name or id, or union.")]
ChatTemplate = Annotated[
    str | None, typer.Option(help="base, or an expert's name or id.", show_default="the tokenizer's")
]
MergeHeads = Annotated[bool, typer.Option("--merge-heads", help="Take the mean of heads that the base lacks.")]
Threads = Annotated[int | None, typer.Option(min=1, help="How many threads.", show_default="all processors")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a directory that is not empty.")]
Token = Annotated[str | None, typer.Option(help="For private and gated models.", envvar="HF_TOKEN")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code from the repositories.")]


@app.command("merge")
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
    from neuromerge_hf.errors import MergeError
    from neuromerge_hf.merging import merge, merge_recipe

    with _errors_in_a_sentence():
        if tune_density and not tune:
            raise MergeError("--tune-density says what to try: give --tune module:function to score it.")
        if _is_recipe(context, models):
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
                "config": _config(
                    method,
                    density=density,
                    lambda_parallel=lambda_parallel,
                    lambda_orthogonal=_number_or_auto(lambda_orthogonal),
                    scale=scale,
                    drop_rate=drop_rate,
                    seed=seed,
                    exclude=exclude,
                ),
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


@app.command("plan")
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
    from neuromerge_hf.planner import plan_merge
    from neuromerge_hf.recipe import load_recipe

    with _errors_in_a_sentence():
        settings: dict[str, Any] = {
            "models": models,
            "base_model": base_model,
            "config": _config(
                method,
                density=density,
                lambda_parallel=lambda_parallel,
                lambda_orthogonal=_number_or_auto(lambda_orthogonal),
                scale=scale,
                drop_rate=drop_rate,
                seed=seed,
                exclude=exclude,
            ),
            "dtype": dtype,
            "tokenizer": tokenizer,
            "chat_template": chat_template,
            "merge_heads": merge_heads,
        }
        if _is_recipe(context, models):
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


@app.command("card")
def card_command(
    folder: Annotated[Path, typer.Argument(help="The directory that a merge wrote.", show_default=False)],
    repo_id: Annotated[
        str | None, typer.Option(help="The repository that the card is for.", show_default="the folder itself")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="A JSON file with measurements to add: a list of {model, task, metric, value}.")
    ] = None,
    template: Annotated[Path | None, typer.Option(help="A Jinja template that replaces sections of the card.")] = None,
) -> None:
    """Write or refresh the model card of a merged model."""
    from neuromerge_hf.model_cards import write_card
    from neuromerge_hf.report import load_report
    from neuromerge_hf.results import load_results

    with _errors_in_a_sentence():
        if results:
            load_report(folder).add_results(load_results(results))
        typer.echo(f"The card is in {write_card(folder, repo_id, template=template)}")


@app.command("push")
def push_command(
    folder: Annotated[Path, typer.Argument(help="The output directory of a merge.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(help="The repository on the Hub, owner/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="The branch, which is made if it is not there.", show_default="main")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    commit_message: Annotated[str | None, typer.Option(help="The first line of the commit's message.")] = None,
    commit_description: Annotated[str | None, typer.Option(help="The rest of it.")] = None,
    template: Annotated[Path | None, typer.Option(help="A Jinja template that replaces sections of the card.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="One more tag for the card. Repeatable.")] = None,
    token: Token = None,
) -> None:
    """Upload a merged model with its card, as one commit. Files that are there already are not sent again."""
    from neuromerge_hf.hub import push

    with _errors_in_a_sentence():
        commit = push(
            folder,
            repo_id,
            private=private or None,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
            template=template,
            tags=tag or (),
        )
        typer.echo(commit.pr_url or commit.commit_url)


@app.command("compare")
def compare_command(
    models: Models,
    evaluate: Annotated[
        str, typer.Option("--eval", help="module:function that scores a model; greater is better.", show_default=False)
    ],
    base_model: BaseModel = None,
    output: Annotated[
        Path | None, typer.Option(help="The folder for the table (JSON, Markdown) and the picture.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="A method to compare. Repeatable.", show_default="all, at their defaults")
    ] = None,
    dtype: Dtype = "auto",
    tokenizer: Tokenizer = "base",
    chat_template: ChatTemplate = None,
    merge_heads: MergeHeads = False,
    device: Annotated[str | None, typer.Option(help="Where to merge.", show_default="the accelerator, or cpu")] = None,
    threads: Threads = None,
    token: Token = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Merge with each method, evaluate each merge, the base and every expert, and print one table."""
    from neuromerge_hf.comparison import compare_methods
    from neuromerge_hf.config import config_class
    from neuromerge_hf.evaluation import load_function

    with _errors_in_a_sentence():
        comparison = compare_methods(
            models,
            load_function(evaluate),
            base_model=base_model,
            methods=[config_class(name)() for name in method or ()],
            output_dir=output,
            dtype=dtype,
            tokenizer=tokenizer,
            chat_template=chat_template,
            merge_heads=merge_heads,
            device=device,
            threads=threads,
            token=token,
            trust_remote_code=trust_remote_code,
        )
        typer.echo(comparison)


def _tuned(
    models: list[str], output: Path, tune: str, densities: list[float] | None, settings: dict[str, Any]
) -> "MergeReport":
    from neuromerge_hf.evaluation import load_function
    from neuromerge_hf.tuning import tune_lambdas
    from neuromerge_hf.tuning_table import to_markdown

    evaluate = load_function(tune)
    found = tune_lambdas(models, evaluate, densities=densities, tuned_on=tune, output_dir=output, **settings)
    typer.echo(to_markdown(found.trials, found.best))
    assert found.report is not None, "there is an output directory"
    return found.report


@contextmanager
def _errors_in_a_sentence() -> Iterator[None]:
    from neuromerge_hf.errors import MergeError

    try:
        yield
    except MergeError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None


def _is_recipe(context: typer.Context, models: list[str]) -> bool:
    """Whether the models are those of a recipe, which then leaves nothing else to be said."""
    from neuromerge_hf.errors import MergeError

    if len(models) != 1 or not models[0].endswith((".yaml", ".yml")):
        return False
    sources = {name: context.get_parameter_source(name) for name in IN_RECIPE if name in context.params}
    given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise MergeError(f"The recipe {models[0]} says this itself: leave {options} out.")
    return True


def _config(method: str, **settings: Any) -> "MergeConfig":
    """The configuration of a method from the options that were given."""
    from neuromerge_hf.config import config_class
    from neuromerge_hf.errors import MergeError

    config = config_class(method)
    given = {name: value for name, value in settings.items() if value is not None}
    strange = given.keys() - {field.name for field in dataclasses.fields(config)}
    if strange:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(strange))
        raise MergeError(f"--method {method} has no {options}: leave it out, or choose another method.")
    return config(**given)


def _number_or_auto(value: str | None) -> Any:
    try:
        return None if value is None else float(value)
    except ValueError:
        return value  # the config says what is wrong, unless it is "auto"
