"""Checks before a merge that the merged model can be written."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants

from neuromerge_hf.engine.device import find_device
from neuromerge_hf.errors import MergeError, Problems
from neuromerge_hf.folder.output import check_unused
from neuromerge_hf.folder.replaceable import check_replaceable, files_of_merge, previous_card
from neuromerge_hf.spec import MergeSpec, Runtime
from neuromerge_hf.storage.location import Location
from neuromerge_hf.storage.temporary import remove_leftovers
from neuromerge_hf.text import readable_size

if TYPE_CHECKING:
    from neuromerge_hf.planning.costs import Costs  # imports transformers, which takes seconds

SHARD_SIZE = re.compile(r"\s*\d+(\.\d+)?\s*[KMGT]B\s*", re.IGNORECASE)


def check_settings(
    spec: MergeSpec, runtime: Runtime, target: Path | None = None, problems: Problems | None = None
) -> Problems:
    """Check what does not depend on the models: the output directory, the sizes of its files, and the device.

    Args:
        spec: what to merge.
        runtime: how to run the merge.
        target: the output directory, if there is one.
        problems: problems that were found before.

    Returns:
        All problems, to be reported with those of the models.
    """
    problems = Problems() if problems is None else problems
    if target:
        problems.attempt(partial(check_output, target, runtime.overwrite))
    problems.attempt(partial(check_shard_size, spec.max_shard_size))
    if runtime.device is not None:  # finding the default would make it this process's current device
        problems.attempt(partial(find_device, runtime.device))
    return problems


def check_output(target: Path, overwrite: bool, files: Collection[str] | None = None, kind: str = "merge") -> None:
    """Raise a `MergeError` if the output directory cannot be written, or exists and must not be replaced.

    What killed processes left beside it is removed first, and what they were replacing is restored.

    Args:
        files: the files in it that may be deleted; by default those of the merge that wrote it.
        kind: what writes the directory.
    """
    target = target.resolve()
    remove_leftovers(target.parent)
    check_unused(target, overwrite)
    if target.is_dir() and any(target.iterdir()):
        check_replaceable(target, files_of_merge if files is None else lambda _: files, kind)
        if files is None:
            previous_card(target)
    if target.is_mount():
        raise MergeError(
            f"The output directory {target} is a mount point, which cannot be replaced. Choose a folder inside it."
        )
    parent = next(parent for parent in target.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise MergeError(
            f"The output directory {target} cannot be written: {parent} is no folder that this process may write in. "
            "Choose another one."
        )


def check_inputs_stay(target: Path, models: Sequence[Location]) -> None:
    """Raise a `MergeError` if the output directory is or holds one of the models."""
    for model in models:
        folder = model.folder.resolve()
        if target.resolve() in (folder, *folder.parents):
            raise MergeError(f"The output directory {target} holds the model {model}. Choose another one.")


def check_shard_size(max_shard_size: str | int) -> None:
    """Raise a `MergeError` unless the value is a size."""
    if isinstance(max_shard_size, str):
        is_size = SHARD_SIZE.fullmatch(max_shard_size) is not None
    else:
        is_size = isinstance(max_shard_size, int) and max_shard_size > 0
    if not is_size:
        raise MergeError(f'max_shard_size must be a size such as "5GB", or a number of bytes, not {max_shard_size!r}.')


def check_disk(costs: "Costs", target: Path) -> None:
    """Raise a `MergeError` if the merged model or the downloads do not fit on their disks."""
    output = costs.disk - costs.bytes_to_download
    needed: Counter[Path] = Counter()
    for path, size in ((target, output), (Path(constants.HF_HUB_CACHE).absolute(), costs.bytes_to_download)):
        needed[_mount_point(path)] += size
    problems = []
    for disk, size in needed.items():
        usage = shutil.disk_usage(disk)
        if usage.free < size and usage.total > 0:  # some file systems report a size of 0
            problems.append(
                f"No space on the disk: {readable_size(size)} are needed, but only {readable_size(usage.free)} "
                f"are free in {disk}. Free some space, choose another output directory, or move the Hub's cache "
                "(HF_HOME)."
            )
    if problems:
        raise MergeError(problems)


def _mount_point(path: Path) -> Path:
    """Return the mount point of a path's file system. The path need not exist."""
    return next(parent for parent in (path, *path.parents) if parent.is_mount())
