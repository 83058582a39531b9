"""Options stated once: fields of frozen dataclasses, whose metadata the command line and `help()` are made from."""

import dataclasses
from dataclasses import MISSING, dataclass
from typing import Any, get_type_hints


@dataclass(frozen=True)
class Option:
    """A field of a dataclass, as a user meets it.

    Attributes:
        name: of the field, of the keyword, and with dashes of the command line's option.
        type: of its values.
        default: the value where none is given.
        help: what it means, a clause without a full stop.
        shown: the default in words where the value alone would not tell ("all processors"); None to show the value.
    """

    name: str
    type: Any
    default: Any
    help: str
    shown: str | None


def option(default: Any, help: str, *, shown: str | None = None, **arguments: Any) -> Any:
    """A dataclass field with a default and the words that describe it.

    Args:
        default: the value where none is given.
        help: what it means, a clause without a full stop.
        shown: the default in words, where the value alone would not tell.
        **arguments: what else `dataclasses.field` takes.
    """
    return dataclasses.field(default=default, metadata={"help": help, "shown": shown}, **arguments)


def options_of(kind: type) -> list[Option]:
    """The options of a dataclass in their order: its fields that were made with `option`."""
    types = get_type_hints(kind)
    return [
        Option(field.name, types[field.name], None if field.default is MISSING else field.default, **field.metadata)
        for field in dataclasses.fields(kind)
        if "help" in field.metadata
    ]
