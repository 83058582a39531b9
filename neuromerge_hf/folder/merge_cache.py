"""The finished merges that `AutoMergedModel.from_pretrained` keeps, each in a folder named by its fingerprint."""

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from neuromerge_hf.errors import MergeError
from neuromerge_hf.folder.report import load_report
from neuromerge_hf.storage.temporary import remove_leftovers

FINGERPRINT = re.compile(r"[0-9a-f]{32}")

DELETED = ".deleted-"
"""How the name of a folder begins that is being deleted, so that an interrupted deletion leaves no half merge."""

HEADS = "heads"
"""The folder of links that bring merges and heads together; see `loading.heads`."""


@dataclass(frozen=True)
class CachedMerge:
    """A finished merge in the cache.

    Attributes:
        id: its name in the cache.
        folder: where it is.
        size: its size on the disk in bytes.
        made: the time when it was made, in seconds since 1970.
        description: its base, experts and method, or what is wrong with its report.
    """

    id: str
    folder: Path
    size: int
    made: float
    description: str


def list_merges(cache: Path) -> list[CachedMerge]:
    """The finished merges in a cache, the newest first; none if there is no such folder."""
    folders = [path for path in cache.iterdir() if _is_merge(path)] if cache.is_dir() else []
    found = [CachedMerge(path.name, path, _size(path), path.stat().st_mtime, _describe(path)) for path in folders]
    return sorted(found, key=lambda each: -each.made)


def delete_merges(cache: Path, ids: Iterable[str]) -> list[Path]:
    """Delete merges from a cache, and the links to them. A process that has loaded one can go on with it.

    Args:
        cache: the folder of the cache.
        ids: the names of the merges, or how these begin.

    Returns:
        The folders that were deleted.

    Raises:
        MergeError: if an id names no merge or several, before anything is deleted.
    """
    names = [path.name for path in cache.iterdir() if _is_merge(path)] if cache.is_dir() else []
    chosen, problems = [], []
    for given in ids:
        matching = [name for name in names if name.startswith(given)]
        if len(matching) == 1:
            chosen.append(matching[0])
        else:
            count = "no merge" if not matching else f"{len(matching)} merges"
            problems.append(f"{given!r:.100} names {count} in {cache}: `neuromerge cache ls` lists them.")
    if problems:
        raise MergeError(problems)
    remove_leftovers(cache)
    for path in cache.glob(f"{DELETED}*"):  # first: the same merge may have been made again
        shutil.rmtree(path)
    for name in dict.fromkeys(chosen):
        (cache / name).rename(cache / f"{DELETED}{name}")
    for path in [*cache.glob(f"{DELETED}*"), *_dangling(cache)]:
        shutil.rmtree(path)
    return [cache / name for name in dict.fromkeys(chosen)]


def _is_merge(path: Path) -> bool:
    return FINGERPRINT.fullmatch(path.name) is not None and path.is_dir() and not path.is_symlink()


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def _describe(folder: Path) -> str:
    try:
        report = load_report(folder)
    except MergeError as error:
        return f"damaged: {error}"
    base, *experts = report.model_names
    return f"{', '.join(experts)} into {base}, {report.method}"


def _dangling(cache: Path) -> list[Path]:
    """The folders of links of which one leads nowhere."""
    folders = [path for path in cache.glob(f"{HEADS}/*/*") if path.is_dir()]
    return [folder for folder in folders if any(not os.path.exists(path) for path in folder.iterdir())]
