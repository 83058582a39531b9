"""``neuromerge compare``."""

from pathlib import Path
from typing import Annotated

import typer

from neuromerge_hf.cli.common import errors_in_a_sentence
from neuromerge_hf.cli.options import (
    BaseModel,
    ChatTemplate,
    Dtype,
    MergeHeads,
    Models,
    Threads,
    Token,
    Tokenizer,
    TrustRemoteCode,
)


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
    from neuromerge_hf.config import config_class
    from neuromerge_hf.tuning.compare import compare_methods
    from neuromerge_hf.tuning.evaluation import load_function

    with errors_in_a_sentence():
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
