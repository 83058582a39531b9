"""Which folders a merge may replace: those of earlier merges, if they hold nothing else. Their cards are continued."""

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeAlias

from neuromerge_hf.errors import MergeError
from neuromerge_hf.folder.recipe import RECIPE_NAME
from neuromerge_hf.folder.report import load_report
from neuromerge_hf.storage.files import CARD
from neuromerge_hf.storage.temporary import is_temporary_file

OF_THE_SYSTEM = (".DS_Store", "Thumbs.db", "desktop.ini")
"""Files that file managers put into every folder that they show."""

LOOKS = 100
"""How often a folder is looked at that other processes replace all the time."""

LISTED = 5
"""How many files an error lists."""


FilesOf: TypeAlias = Callable[[Path], Collection[str]]


def files_of_merge(folder: Path) -> list[str]:
    """The paths of the files that a merge wrote into a folder, as its report lists them; empty if it is no merge."""
    try:
        return load_report(folder).files if (folder / RECIPE_NAME).is_file() else []
    except MergeError:
        return []


def list_files(folder: Path) -> list[str]:
    """The paths of all files in a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def previous_card(folder: Path) -> str | None:
    """The card in a folder that is replaced, because people may have written into it; None if there is none.

    Raises:
        MergeError: if the card cannot be read.
    """
    path = folder / CARD
    try:
        return path.read_text(encoding="utf-8-sig") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise MergeError(
            f"What people wrote into {path} would be lost, because it cannot be read ({error}). Save it as UTF-8, or "
            "move it away."
        ) from error


def check_replaceable(folder: Path, files_of: FilesOf = files_of_merge, kind: str = "merge") -> None:
    """Raise a `MergeError` if a folder holds other files than those that may be deleted.

    Another process may replace the folder between the looks at its report and at its files, so what is found wrong is
    looked at again in the folder that is there then.

    Args:
        files_of: returns the paths of the files in a folder that may be deleted.
        kind: what wrote these files, for the message.
    """
    for _ in range(LOOKS):
        looked_at = _identity(folder)
        files = files_of(folder)
        others = _others(folder, set(files))
        if not others:
            return
        if _identity(folder) == looked_at:
            break
    named = ", ".join(others[:LISTED]) + (f" and {len(others) - LISTED} more" if len(others) > LISTED else "")
    if not files:
        raise MergeError(
            f"The output directory {folder} is not replaced, because it is no earlier {kind} whose report lists its "
            f"files. It holds {named}. Choose another directory, or empty this one yourself."
        )
    raise MergeError(
        f"The output directory {folder} is not replaced, because it holds what no {kind} wrote: {named}. "
        "Move that away, or choose another directory."
    )


def _others(folder: Path, files: set[str]) -> list[str]:
    """The paths in a folder that are not in `files`. A folder that holds none of these is one path."""
    known = files | {parent.as_posix() for file in files for parent in Path(file).parents}
    found = []
    for path, folders, names in os.walk(folder):
        inner = Path(path).relative_to(folder)
        if inner.as_posix() not in known and inner != Path():  # the parts of a folder are not listed
            found += [f"{inner.as_posix()}/"] * _has_files(Path(path))
            folders.clear()
            continue
        names += [name for name in folders if Path(path, name).is_symlink()]
        others = [name for name in names if name not in OF_THE_SYSTEM and not is_temporary_file(name)]
        found += [name for each in others if (name := (inner / each).as_posix()) not in files]
    return sorted(found)


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        state = folder.stat()
    except OSError:
        return None
    return state.st_dev, state.st_ino


def _has_files(folder: Path) -> bool:
    return any(names for _, _, names in os.walk(folder))
