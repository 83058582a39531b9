"""The options that several commands share."""

from typing import Annotated

import typer

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
    str | None,
    typer.Option(
        help="neuromerging: the weight of the orthogonal part, lambda_2: a number, auto (the paper's), length (ours).",
        show_default="auto",
    ),
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

OF_METHODS = ("density", "lambda_parallel", "lambda_orthogonal", "scale", "drop_rate", "seed", "exclude")
"""The options that are hyper-parameters of a method."""

IN_RECIPE = (
    "base_model",
    "method",
    *OF_METHODS,
    "tune",
    "tune_density",
    "dtype",
    "tokenizer",
    "chat_template",
    "merge_heads",
    "max_shard_size",
)
"""The options that a recipe holds."""
