"""The options of the commands, made from the fields of `MergeSpec`, `Runtime` and the methods' configurations."""

import inspect
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import typer

from neuromerge_hf.config import DEFAULT_METHOD, METHODS, config_classes
from neuromerge_hf.options import Option, options_of
from neuromerge_hf.spec import MergeSpec, Runtime

Command = TypeVar("Command", bound=Callable[..., None])

EXPERTS: Any = typer.Argument(
    help="The experts: folders or ids on the Hub (owner/name, owner/name/folder, id@revision). Or one recipe.yaml.",
    show_default=False,
)
Models = Annotated[list[str] | None, EXPERTS]
ConfigFile = Annotated[
    Path | None,
    typer.Option(help="A YAML file that describes the merge: a recipe, your own, or mergekit's.", show_default=False),
]

JSON = Annotated[bool, typer.Option("--json", help="Print JSON for programs, and not a summary.")]


def method_name(text: str) -> str:
    """The name of a method, from one in any case. The table of methods may have grown since this was imported."""
    name = text.lower().replace("-", "_")
    if name not in METHODS:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(METHODS)}.")
    return name


Method = Annotated[
    str | None,
    typer.Option(
        parser=method_name,
        metavar="METHOD",
        help=f"The method: {', '.join(METHODS)}.",
        show_default=f"{DEFAULT_METHOD}; with --tune or hyper-parameters of neuromerging, that",
    ),
]

Token = Annotated[str | None, typer.Option(help="The token for private and gated models.", envvar="HF_TOKEN")]

__all__ = [
    "EXPERTS",
    "JSON",
    "ConfigFile",
    "Method",
    "Models",
    "Token",
    "method_name",
    "method_options",
    "takes_options",
]


def takes_options(*, without: Collection[str] = (), methods: bool = False) -> Callable[[Command], Command]:
    """Give a command that takes ``**options`` an option for each field of `MergeSpec` and `Runtime`.

    Args:
        without: names of fields that the command does not take.
        methods: whether it also takes the hyper-parameters of the methods.
    """

    def decorate(command: Command) -> Command:
        hyper_parameters = [_combined(by_method) for by_method in method_options().values()] if methods else []
        panels = {
            "Settings of the method": hyper_parameters,
            "Merged model": options_of(MergeSpec),
            "How to run it": options_of(Runtime),
        }
        parameters = [
            _parameter(each, panel)
            for panel, options in panels.items()
            for each in options
            if each.name not in ("config", *without)
        ]
        signature = inspect.signature(command)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        command.__signature__ = signature.replace(parameters=[*own, *parameters])  # type: ignore[attr-defined]
        return command

    return decorate


def method_options() -> dict[str, dict[str, Option]]:
    """The hyper-parameters of all methods, by their name and then by the name of the method."""
    found: dict[str, dict[str, Option]] = {}
    for config in config_classes():
        for option in options_of(config):
            found.setdefault(option.name, {})[config.method] = option
    return found


def _combined(by_method: Mapping[str, Option]) -> Option:
    """One option for a hyper-parameter of several methods, with their defaults, and their names unless all have it."""
    first = next(iter(by_method.values()))
    defaults = [option.shown or str(option.default) for option in by_method.values()]
    usual = max(defaults, key=defaults.count)
    named = zip(by_method, defaults, strict=True)
    others = [f"of {method}, {default}" for method, default in named if default != usual]
    shown = None if first.default == () else "; ".join([usual, *others])
    methods = "" if len(by_method) == len(config_classes()) else f"{', '.join(by_method)}: "
    return Option(first.name, first.type, None, f"{methods}{first.help}", shown, first.command_line)


def _parameter(option: Option, panel: str) -> inspect.Parameter:
    """The parameter of a command from which typer makes an option, in a panel of the help."""
    kind = _kind(option.type)
    flags = [f"--{option.name.replace('_', '-')}"] if kind is bool else []
    starts_with_method = option.help.split()[0].strip(",:") in METHODS
    words = option.help if starts_with_method else f"{option.help[0].upper()}{option.help[1:]}"
    shown = option.shown if option.shown is not None else option.default is not None
    description = typer.Option(
        *flags,
        help=f"{words}." + (" Repeatable." if kind == list[str] else ""),
        show_default=shown,
        rich_help_panel=panel,
        **{**_parser(option.type), **option.command_line},
    )
    annotation = Annotated[kind | None if option.default is None else kind, description]  # type: ignore[valid-type]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=annotation)


def _parser(type: Any) -> dict[str, Any]:
    """Arguments of `typer.Option` for an option that takes a number or a text, such as a size or a rule's name."""
    numbers = [each for each in (int, float) if each in get_args(type)]
    if not numbers or len(get_args(type)) == 1 + (None.__class__ in get_args(type)):
        return {}

    def parse(text: str) -> Any:
        for number in numbers:
            with suppress(ValueError):
                return number(text)
        return text

    return {"parser": parse, "metavar": f"<{' | '.join(each.__name__ for each in [*numbers, str])}>"}


def _kind(type: Any) -> Any:
    """The type of an option on the command line: a list of strings for a tuple, else a string unless it is plain."""
    if get_origin(type) is tuple:
        return list[str]
    kinds = [each for each in get_args(type) if each is not None.__class__]
    return (kinds[0] if len(kinds) == 1 and get_origin(kinds[0]) is None else str) if kinds else type
