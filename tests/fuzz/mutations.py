"""Mutations of JSON-like values and of the files that hold them, which campaigns share."""

import json
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 64, 2**31, 2**63, 10**20, 10**320, -(10**320), 0.0, -0.5, 1.5, 1e300,
    float("nan"), float("inf"), float("-inf"), "", " ", "64", "none", "null", "auto", "x" * 5000, "\ud800", "\x00",
    "é", "../x",
    "(", "(a+)+$", "(a|a)*b", ".*.*.*.*.*.*.*.*x", [], [None], [1], ["x"], [[]], [0] * 3, [{}], {}, {"a": 1},
    {"": None},
    {"x": {"y": []}}, {"0": "a", "1": 2}, "main", "2024-01-01", "bfloat16", "float8", "silu", "~nouser/x",
)  # fmt: skip
"""Values of every type, out of range, and in none of the forms that settings have."""


class Hung(BaseException):
    """The case took too long. It is no `Exception`, so that no code of a library catches it."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `Hung` in the block once it has taken so long."""

    def stop(*_: object) -> None:
        raise Hung(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def mutate(content: Any, rng: random.Random, keys: tuple[str, ...] = ()) -> tuple[Any, str]:
    """Change one value in a dictionary, wherever it is nested, and say which.

    Args:
        keys: names of settings that may be added.
    """
    places = list(_places(content))
    parent, key = rng.choice(places)
    kind = rng.random()
    if keys and kind < 0.25:
        key, value = rng.choice(keys), rng.choice(VALUES)
        content[key] = value
        return content, f"{key} added as {value!r:.60}"
    if kind < 0.35:
        del parent[key]
        return content, f"{key} deleted"
    if kind < 0.42:
        depth = rng.choice([70, 300, 900])
        parent[key] = deep(depth, rng.choice(["list", "dict"]))
        return content, f"{key} nested {depth} levels deep"
    if kind < 0.5:
        _, other = rng.choice(places)
        parent[key] = rng.choice([[parent[key]], {"a": parent[key]}, str(parent[key]), other])
        return content, f"{key} as {parent[key]!r:.60}"
    parent[key] = rng.choice(VALUES)
    return content, f"{key} as {parent[key]!r:.60}"


def deep(depth: int, kind: str) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(content, dict | list):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from _places(content[key])


def spoil(path: Path, rng: random.Random) -> str:
    """Put something else in the place of a text file, and say what."""
    data = path.read_bytes()
    contents = {
        "empty": b"",
        "cut": data[: rng.randrange(len(data))],
        "a list": b"[]",
        "null": b"null",
        "a text": b'"config"',
        "UTF-16": data.decode().encode("utf-16"),
        "with a BOM": b"\xef\xbb\xbf" + data,
        "Latin-1": data + b"\xe9",
        "zeros": bytes(200),
        "garbage": rng.randbytes(300),
        "deep lists": b"[" * 100_000,
        "deep dictionaries": b'{"a":' * 100_000,
        "a key twice": data.replace(b"{", b'{"model_type": 3, "model_type": 4,', 1),
        "an endless number": data.replace(b"{", b'{"x": 1' + b"0" * 5000 + b",", 1),
        "a page": b"<!DOCTYPE html><html></html>",
        "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    }
    kind = rng.choice([*contents, "a folder", "a pipe", "a loop", "a file that cannot be read"])
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a loop":
        path.symlink_to(path.name)
    elif kind == "a file that cannot be read":
        path.symlink_to("/proc/self/mem")
    else:
        path.write_bytes(contents[kind])
    return f"{path.name} is {kind}"


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))
