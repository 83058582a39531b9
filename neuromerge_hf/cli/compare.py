"""``neuromerge compare``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from neuromerge_hf.cli.common import echo
from neuromerge_hf.cli.messages import say
from neuromerge_hf.cli.options import EXPERTS, JSON, method_name, takes_options
from neuromerge_hf.tuning.comparison import NOT_COMPARED


@takes_options(without=NOT_COMPARED)
def compare_command(
    models: Annotated[list[str], EXPERTS],
    evaluate: Annotated[
        str, typer.Option("--eval", help="module:function that scores a model; greater is better.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder for the table (JSON, Markdown) and the picture.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            parser=method_name,
            metavar="METHOD",
            help="A method to compare. Repeatable.",
            show_default="all, at their defaults",
        ),
    ] = None,
    as_json: JSON = False,
    **options: Any,
) -> None:
    """Merge with each method, evaluate each merge, the base and every expert, and print one table."""
    say("Loading torch and transformers")
    from neuromerge_hf.tuning.compare import compare_methods
    from neuromerge_hf.tuning.evaluation import load_function

    function = load_function(evaluate)
    echo(compare_methods(models, function, methods=method, output_dir=output, **options), as_json)
