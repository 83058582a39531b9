"""What several commands do."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from neuromerge_hf.cli.options import IN_RECIPE

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


def method_config(method: str, **settings: Any) -> "MergeConfig":
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


def number_or_rule(value: str | None) -> Any:
    try:
        return None if value is None else float(value)
    except ValueError:
        return value  # the config says what is wrong, unless it is "auto" or "length"
