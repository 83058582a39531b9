"""JSON, YAML and text from anywhere are read, or refused in one `MergeError` that names the file."""

import os

import pytest

from neuromerge_hf import MergeError
from neuromerge_hf.storage.documents import DEEPEST, load_json, load_yaml, read_text, reading
from neuromerge_hf.storage.paths import user_path

CONTENTS = {
    "empty": (b"", "Expecting value"),
    "no JSON": (b"<html>", "Expecting value"),
    "another kind": (b"[1]", r"no dictionary, but \[1\]"),
    "nested": (b'{"a":' * 100_000, "nested too deeply"),
    "nested a little": (b'{"a": ' + b"[" * DEEPEST + b"]" * DEEPEST + b"}", f"more than {DEEPEST} levels"),
    "a key twice": (b'{"x": {"a": 1, "a": 2}}', "'a' twice"),
    "endless digits": (b'{"a": 1' + b"0" * 400 + b"}", "more than 300 digits"),
    "half a surrogate pair": (b'{"a": "\\ud800"}', "surrogates not allowed"),
    "no UTF-8": (b'{"a": "\xff"}', "utf-8"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_json_that_is_not_what_it_should_be_is_refused(name, tmp_path):
    content, reason = CONTENTS[name]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(MergeError, match=f"{path} cannot be read: .*{reason}"):
        load_json(path)


YAML = {
    "an alias": ("a: &a [1]\nb: *a", r"has an alias \(\*\)"),
    "a bomb": ("a: &a [x, x]\n" + "".join(f"{n}: &{n} [*{b}, *{b}]\n" for b, n in zip("abc", "bcd")), "alias"),  # noqa: B905
    "a key twice": ("a: 1\na: 2", "'a' twice"),
    "no date": ("a: 2024-13-45", "month must be in 1..12"),
    "a huge number": ("a: 0x" + "f" * 5000, "300 digits"),
    "code": ("a: !!python/object/apply:os.mkdir [ran]", "could not determine a constructor"),
    "nested": ("a: " + "[" * 50_000, "nested more than 64 levels"),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_is_not_plain_is_refused(name, tmp_path):
    content, reason = YAML[name]
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(MergeError, match=rf"recipe\.yaml is no recipe: .*{reason}"):
        load_yaml(tmp_path / "recipe.yaml", "is no recipe")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name, reason in (("pipe", "it is a pipe"), ("folder", "it is a folder"), ("loop", "symbolic links")):
        with pytest.raises(MergeError, match=f"{name} cannot be read: .*{reason}"):
            read_text(tmp_path / name)
    with pytest.raises(MergeError, match=r"/dev/null cannot be read: it is a device or a socket"):
        read_text(type(tmp_path)("/dev/null"))


def test_a_file_that_cannot_be_read_or_is_too_large_is_refused(tmp_path):
    (tmp_path / "memory").symlink_to("/proc/self/mem")  # a regular file whose first byte nobody can read
    with pytest.raises(MergeError, match="memory cannot be read: Input/output error"):
        read_text(tmp_path / "memory")
    (tmp_path / "large").write_bytes(bytes(11))
    with pytest.raises(MergeError, match="large cannot be read: it has 11 B, and such a file has 10 B at most"):
        read_text(tmp_path / "large", largest=10)


def test_errors_of_other_libraries_name_the_file_and_keep_their_cause(tmp_path):
    for error, reason in ((KeyError("a"), "'a' is missing"), (TypeError(), "TypeError"), (ValueError("x."), "x")):
        with pytest.raises(MergeError) as caught, reading(tmp_path / "f", remedy="Save it again."):
            raise error
        assert str(caught.value) == f"{tmp_path / 'f'} cannot be read: {reason}. Save it again."
        assert caught.value.__cause__ is error


@pytest.mark.parametrize("value", [None, 3, b"x", "", "~nouser/x", "x" * 256, "a/" + "x" * 256, "a\0b", "\ud800", []])
def test_what_is_no_path_is_refused_by_the_name_of_the_argument(value):
    with pytest.raises(MergeError, match=r"^output_dir"):
        user_path(value, "output_dir")
