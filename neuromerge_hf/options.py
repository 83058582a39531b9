"""Options as fields of frozen dataclasses. The command line and `help()` are made from the fields' metadata."""

import dataclasses
import difflib
import inspect
import textwrap
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """An option of functions and commands: a field of a dataclass.

    Attributes:
        name: the name of the field and the keyword; the command line's option has dashes in it.
        type: the type of the values.
        default: the value if none is given.
        help: what the option means, as a clause without a full stop.
        shown: the default in words, if the value alone does not tell it ("all processors"); None shows the value.
        command_line: further arguments of `typer.Option`.
    """

    name: str
    type: Any
    default: Any
    help: str
    shown: str | None
    command_line: Mapping[str, Any]

    def __str__(self) -> str:
        """Return the option as a line of a docstring."""
        default = self.shown or ("none" if self.default is None else self.default)
        return f"{self.name}: {self.help}. Default: {default}."


def option(
    default: Any,
    help: str,
    *,
    shown: str | None = None,
    command_line: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """Return a dataclass field with a default and a description.

    Args:
        default: the value if none is given.
        help: what the option means, as a clause without a full stop.
        shown: the default in words, if the value alone does not tell it.
        command_line: further arguments of `typer.Option`, such as ``{"min": 1}``.
        **arguments: further arguments of `dataclasses.field`.
    """
    metadata = {"help": help, "shown": shown, "command_line": command_line or {}}
    if "default_factory" not in arguments:
        arguments["default"] = default
    return dataclasses.field(metadata=metadata, **arguments)


def options_of(kind: type) -> list[Option]:
    """Return the options of a dataclass in their order: the fields that were made with `option`."""
    types = get_type_hints(kind)
    return [
        Option(field.name, types[field.name], None if field.default is MISSING else field.default, **field.metadata)
        for field in dataclasses.fields(kind)
        if "help" in field.metadata
    ]


def with_options(
    *kinds: type, without: Collection[str] = (), takes_others: bool = False
) -> Callable[[Function], Function]:
    """Return a decorator that shows the options of dataclasses as keywords of a function with ``**options``.

    They appear in its signature and at the end of its docstring's Args, for `help`, completion and documentation.

    Args:
        kinds: the dataclasses.
        without: names of options that the function does not take.
        takes_others: whether the function takes further keywords. The signature then keeps ``**options``.
    """

    def decorate(function: Function) -> Function:
        options = [each for kind in kinds for each in options_of(kind) if each.name not in without]
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        others = [each for each in signature.parameters.values() if each.kind is inspect.Parameter.VAR_KEYWORD]
        parameters = [*own, *map(_keyword, options), *(others if takes_others else [])]
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        function.__doc__ = _add_to_docstring(function.__doc__, options, takes_others)
        return function

    return decorate


def pick(kind: type[T], options: Mapping[str, Any], **values: Any) -> T:
    """Return an instance of a dataclass, made from `values` and from those `options` that are its fields."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**values, **{name: value for name, value in options.items() if name in names})


def check_names(function: str, options: Collection[str], known: Collection[str]) -> None:
    """Raise a `TypeError` for a keyword that a function does not take. The error names the nearest known one."""
    for name in options:
        if name not in known:
            near = nearest(name, known)
            raise TypeError(f"{function} has no argument {name!r}." + (f" Did you mean {near!r}?" if near else ""))


def nearest(name: str, known: Collection[str]) -> str | None:
    """Return the known name that a name was probably meant to be; None if none is near."""
    longer = [each for each in known if each.startswith(f"{name}_") or each.endswith(f"_{name}")]
    return next(iter([*longer, *difflib.get_close_matches(name, known, n=1)]), None)


def _keyword(option: Option) -> inspect.Parameter:
    annotation = option.type | None if option.default is None else option.type
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=annotation)


def _add_to_docstring(text: str | None, options: Collection[Option], takes_others: bool) -> str | None:
    """A docstring with the options that it does not describe itself, in the place of its entry ``**options``.

    The entry stays after them where a function takes other keywords, too.
    """
    if text is None:  # python -OO
        return None
    lines = inspect.cleandoc(text).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("    **options"))
    after = (n for n, line in enumerate(lines[start + 1 :], start + 1) if not line.startswith("        "))
    stop = start if takes_others else next(after, len(lines))
    missing = [str(each) for each in options if not any(line.startswith(f"    {each.name}:") for line in lines)]
    described = [textwrap.fill(each, 110, initial_indent=" " * 4, subsequent_indent=" " * 8) for each in missing]
    return "\n".join([*lines[:start], *described, *lines[stop:]])
