"""Checks that the values of dataclasses are of the types that their fields declare."""

import dataclasses
import functools
import numbers
import os
import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from neuromerge_hf.errors import MergeError

WORDS: dict[Any, str] = {
    str: "a text",
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    type(None): "None",
    os.PathLike: "a path",
}

ABSTRACT: dict[Any, type] = {int: numbers.Integral, float: numbers.Real}
"""What counts as a number: also those of numpy."""


def check_fields(instance: Any, without: Collection[str] = ()) -> None:
    """Raise a `MergeError` that names the first field of a dataclass whose value is of another type than declared."""
    for name, annotation in _annotations(type(instance)).items():  # type: ignore[arg-type]
        value = getattr(instance, name)
        if name not in without:
            check_value(name, value, annotation)


def check_value(name: str, value: object, annotation: Any) -> None:
    """Raise a `MergeError` if the value of an argument or a field is of another type than the annotation says."""
    if not fits(value, annotation):
        raise MergeError(f"{name} must be {words(annotation)}, not {value!r:.200}.")


def fits(value: object, annotation: Any) -> bool:
    """Return whether a value is of the type that an annotation of a dataclass's field describes."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if dataclasses.is_dataclass(annotation):
        return type(value) is annotation and all(
            fits(getattr(value, name), each) for name, each in _annotations(type(value)).items()
        )
    if annotation is str:
        return isinstance(value, str) and (value.isascii() or _is_unicode(value))
    if origin is None:
        is_kind = isinstance(value, ABSTRACT.get(annotation, annotation))
        return is_kind and (annotation in (bool, object) or not isinstance(value, bool))
    if not isinstance(value, origin) or isinstance(value, str):
        return False
    if issubclass(origin, Mapping):
        return all(fits(key, inner[0]) and fits(each, inner[1]) for key, each in value.items())
    return not issubclass(origin, Sequence) or all(fits(each, inner[0]) for each in value)


def words(annotation: Any) -> str:
    """Return an annotation in words: "a text or None"."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(map(words, inner))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a list, each item of which is {words(inner[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a dictionary, each value of which is {words(inner[1])}"
    kind = origin or annotation
    return WORDS.get(kind, f"a {getattr(kind, '__name__', kind)}")


def _is_unicode(text: str) -> bool:
    """Whether a text can be written: one from the command line may hold half of a surrogate pair."""
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


@functools.cache
def _annotations(kind: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
