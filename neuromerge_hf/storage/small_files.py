"""Checks of a model's small files before they are read: links stay in the folder, names are text, sizes have limits."""

import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

from neuromerge_hf.errors import MergeError, printable
from neuromerge_hf.storage.files import (
    ADAPTER_FILES,
    CARD,
    CHECKPOINT_FILES,
    COMPANIONS,
    CONFIGS,
    LICENCE_FILES,
    LICENCE_SUFFIXES,
    companion_files,
    licence_files,
)
from neuromerge_hf.storage.sentence_modules import module_files
from neuromerge_hf.text import readable_size

LARGEST_CARD = 1_000_000
"""The size in bytes up to which a parent's card is read. Cards with hundreds of results have half of it."""

OF_A_MERGE = ("recipe.yaml", "merge_report.json")

LARGEST = {CONFIGS: 16_000_000, OF_A_MERGE: 100_000_000, LICENCE_FILES: 10_000_000, COMPANIONS: 1_000_000_000}
"""The size in bytes up to which files of these names are read and copied."""

MORE_TEMPLATES = "additional_chat_templates"
"""A folder of chat templates, which transformers reads with a tokenizer and saves again."""

CODE = ("*.py",)


def leads_out(path: Path, folder: Path) -> Path | None:
    """Return where a path leads if links take it out of a model's folder, else None.

    In the Hub's cache, ``snapshots/<commit>/<file>`` is a link to ``blobs/<hash>``. That is no way out, wherever the
    cache lies.
    """
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if real.is_relative_to(root):
        return None
    for commit in (root, *root.parents):
        if commit.parent.name == "snapshots" and real.parent == commit.parent.parent / "blobs":
            return None
    return real


def check_small_files(folder: Path, *, is_cached: bool = False) -> None:
    """Check the small files of a model before any of them is read.

    Weights may be links to anywhere, because they are read and not copied. Code is checked by `check_code`, if it is
    trusted. A model's card is checked when it is read: no merge depends on it.

    Args:
        folder: the model's folder.
        is_cached: whether the Hub's client put the files there, so that their links are its own.

    Raises:
        MergeError: if a file is a link out of the folder or to nothing, too large, not readable, or has a name that
            cannot be written.
    """
    problems = [problem for path in _small_files(folder) if (problem := _problem(path, folder, is_cached))]
    problems += [
        f"{path} is a link to {os.readlink(path)}, which does not exist. Mend the link, or remove it."
        for path in (folder / name for name in (*CHECKPOINT_FILES, *ADAPTER_FILES))
        if path.is_symlink() and not path.exists()
    ]
    if problems:
        raise MergeError(problems)


def check_code(folder: Path) -> None:
    """Raise a `MergeError` if a file of code, which is copied and run if it is trusted, is a link out of the folder."""
    problems = [problem for path in _matching(folder, CODE) if (problem := _problem(path, folder, is_cached=False))]
    if problems:
        raise MergeError(problems)


def check_sizes(model: str, sizes: Mapping[str, int]) -> None:
    """Raise a `MergeError` if a small file of a model on the Hub is too large. No file is downloaded yet.

    Args:
        model: the model's id.
        sizes: the size in bytes of each file in the model's folder, by its name.
    """
    problems = [problem for name, size in sizes.items() if (problem := _too_large(name, size, f"{model}/{name}"))]
    if problems:
        raise MergeError(problems)


def read_files(folder: Path) -> list[Path]:
    """The files in a model's folder that a merge reads or copies, but for the shards that an index lists."""
    names = (*CONFIGS, *CHECKPOINT_FILES, *ADAPTER_FILES, *COMPANIONS, CARD)
    templates = sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
    found = [*companion_files(folder, names), *licence_files(folder), *templates, *module_files(folder)]
    return list(dict.fromkeys(found))


def _small_files(folder: Path) -> Iterator[Path]:
    yield from _matching(folder, (*CONFIGS, *OF_A_MERGE, *(name for name in COMPANIONS if name not in CODE)))
    yield from (path for path in _matching(folder, LICENCE_FILES) if path.suffix.lower() in LICENCE_SUFFIXES)
    yield from (folder / MORE_TEMPLATES).glob("*.jinja")
    yield from module_files(folder)


def _matching(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if any(fnmatch(path.name, pattern) for pattern in patterns))


def _problem(path: Path, folder: Path, is_cached: bool) -> str | None:
    """What is wrong with a file that a merge reads and may copy; None if nothing is."""
    if printable(path.name) != path.name:
        return f"The name of {path} has characters that cannot be shown, or is not valid UTF-8. Rename the file."
    if path.is_symlink() and not path.exists():
        return f"{path} is a link to {os.readlink(path)}, which does not exist. Mend the link, or remove it."
    if not path.is_file():
        return None
    outside = None if is_cached else leads_out(path, folder)
    if outside:
        return (
            f"{path} leads out of the model's folder, to {outside}. A merge copies such files, and a push would "
            f"publish whatever lies there. If that is the model's own file, put a copy in the place of the link."
        )
    if not os.access(path, os.R_OK):
        return f"{path} may not be read by this process. Change its permissions."
    return _too_large(path.name, path.stat().st_size, path)


def _too_large(name: str, size: int, path: object) -> str | None:
    for patterns, largest in LARGEST.items():
        if any(fnmatch(name, pattern) for pattern in patterns):
            if size <= largest:
                return None
            return (
                f"{path} has {readable_size(size)}, more than the {readable_size(largest)} up to which such a file is "
                "read. Make sure that it is what its name says."
            )
    return None
