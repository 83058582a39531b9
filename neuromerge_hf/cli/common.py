"""What several commands do."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import typer

from neuromerge_hf.cli.options import IN_RECIPE, OF_METHODS

if TYPE_CHECKING:
    from neuromerge_hf.config import MergeConfig


@contextmanager
def errors_in_a_sentence() -> Iterator[None]:
    from neuromerge_hf.errors import MergeError

    try:
        yield
    except MergeError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None


def is_recipe(context: typer.Context, models: list[str]) -> bool:
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


def method_config(context: typer.Context) -> "MergeConfig":
    """The configuration of the method that was asked for, from those of its options that were given."""
    from neuromerge_hf.config import config_class
    from neuromerge_hf.errors import MergeError

    method = context.params["method"]
    config = config_class(method)
    given = {name: context.params[name] for name in OF_METHODS if context.params[name] is not None}
    strange = given.keys() - {field.name for field in dataclasses.fields(config)}
    if strange:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(strange))
        raise MergeError(f"--method {method} has no {options}: leave it out, or choose another method.")
    with suppress(KeyError, ValueError):  # of the name of a rule, or of what the config says is wrong
        given["lambda_orthogonal"] = float(given["lambda_orthogonal"])
    return config(**given)
