"""Reading the small files of models and merges: text, JSON and YAML from anywhere, and what other libraries read."""

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from neuromerge_hf.errors import MergeError
from neuromerge_hf.text import readable_size

LARGEST = 100_000_000
"""The size in bytes up to which a JSON or text file is read. The index of a model with a million tensors is smaller."""

LARGEST_YAML = 2_000_000
"""The size in bytes up to which YAML is read, which takes a second for each megabyte."""

DEEPEST = 64
"""How deeply a file's lists and dictionaries may be nested."""

UNREADABLE = "cannot be read"

LONGEST_REASON = 400
"""The length in characters to which the message of another library is cut."""


@contextmanager
def reading(path: Path, problem: str = UNREADABLE, remedy: str = "") -> Iterator[None]:
    """Turn what the block raises into a `MergeError` that names the file. The block does nothing but read the file.

    It is for the code of other libraries, which raise any kind of exception on files that they do not understand.

    Args:
        path: the file.
        problem: what is wrong with the file, after its name.
        remedy: what to do about it, in a sentence.
    """
    try:
        yield
    except MergeError:
        raise
    except ImportError as error:
        raise MergeError(f"{path} needs a package that is not installed here: {reason_of(error)}.") from error
    except Exception as error:
        raise MergeError(f"{path} {problem}: {reason_of(error)}.{remedy and f' {remedy}'}") from error


def reason_of(error: Exception) -> str:
    """What an exception says, as a clause without a full stop."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = f"{error} is missing" if type(error) is KeyError else str(error).strip().rstrip(".")
    if len(text) > LONGEST_REASON:
        text = f"{text[:LONGEST_REASON]} ..."
    return text or type(error).__name__


def read_text(path: Path, largest: int = LARGEST, encoding: str = "utf-8") -> str:
    """Read a text file.

    Raises:
        MergeError: if it is no regular file (opening a pipe could wait forever), too large, or no text.
    """
    with reading(path):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise MergeError(f"{path} cannot be read: it is {_kind(status.st_mode)}, not a file.")
        if status.st_size > largest:
            raise MergeError(
                f"{path} cannot be read: it has {readable_size(status.st_size)}, and such a file has "
                f"{readable_size(largest)} at most."
            )
        return path.read_text(encoding=encoding)


def load_json(path: Path, kind: type = dict) -> Any:
    """Read a JSON file whose outermost value is a dictionary, or of another kind.

    Raises:
        MergeError: if it cannot be read, is no JSON, has a key twice, or holds another kind of value.
    """
    text = read_text(path)
    with reading(path):
        return _checked(json.loads(text, object_pairs_hook=_without_duplicates), kind)


def load_yaml(path: Path, problem: str = UNREADABLE) -> Any:
    """Read a YAML file whose outermost value is a dictionary, without aliases.

    Args:
        path: the file.
        problem: as in `reading`, if the content is wrong.

    Raises:
        MergeError: if it cannot be read, is no YAML, has a key twice, or holds another kind of value.
    """
    text = read_text(path, LARGEST_YAML)
    with reading(path, problem):
        return _checked(yaml.load(text, _Loader), dict)  # a subclass of SafeLoader


class _Loader(yaml.SafeLoader):
    """Reads plain values. An alias could stand for any number of them, so that nine lines fill the memory."""

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level >= DEEPEST:  # the time that it takes grows with the square of the depth
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError(f"{self.peek_event().start_mark} has an alias (*). Write the value itself there")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        _refuse_duplicates(keys)
        return super().construct_mapping(node, deep)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        _refuse_duplicates([key for key, _ in pairs])
    return made


def _refuse_duplicates(keys: list[str]) -> None:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"it has {key!r} twice")
        seen.add(key)


def _checked(content: Any, kind: type) -> Any:
    """Return the content of a file if it is of the kind, not nested deeply, and its numbers and texts can be shown."""
    if not isinstance(content, kind):
        raise ValueError(f"its outermost value is no {NAMES[kind]}, but {content!r:.50}")
    level: list[Any] = [content]
    for _ in range(DEEPEST):
        level = [inner for value in level for inner in _inner(value)]
        if not level:
            return content
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")


NAMES: dict[Any, str] = {dict: "dictionary", list: "list"}


def _inner(value: Any) -> Iterator[Any]:
    """The keys and values of a dictionary and the items of a list; nothing for a plain value, which is checked."""
    if isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value
    elif isinstance(value, int) and value.bit_length() > 1024:  # no float holds it, and Python may not even print it
        raise ValueError("it has a number with more than 300 digits")
    elif isinstance(value, str) and not value.isascii():
        value.encode()  # raises for half of a surrogate pair, which nothing can write


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "a device or a socket"
