"""``neuromerge compare``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from neuromerge_hf.cli.options import Models, takes_options
from neuromerge_hf.config import config_class
from neuromerge_hf.tuning.comparison import NOT_COMPARED


@takes_options(without=NOT_COMPARED)
def compare_command(
    models: Models,
    evaluate: Annotated[
        str, typer.Option("--eval", help="module:function that scores a model; greater is better.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option(help="The folder for the table (JSON, Markdown) and the picture.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="A method to compare. Repeatable.", show_default="all, at their defaults")
    ] = None,
    **options: Any,
) -> None:
    """Merge with each method, evaluate each merge, the base and every expert, and print one table."""
    from neuromerge_hf.tuning.compare import compare_methods
    from neuromerge_hf.tuning.evaluation import load_function

    methods = [config_class(name)() for name in method or ()]
    function = load_function(evaluate)
    typer.echo(compare_methods(models, function, methods=methods, output_dir=output, **options))
