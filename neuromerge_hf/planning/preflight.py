"""Whether a merged model can be written where it is wanted, known beforehand."""

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants

from neuromerge_hf.errors import MergeError
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.storage.location import Location
from neuromerge_hf.text import readable_size


def check_output(target: Path, overwrite: bool) -> None:
    """Raise a `MergeError` if the output directory cannot be made."""
    if target.exists() and not target.is_dir():
        raise MergeError(f"The output directory {target} is a file.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise MergeError(
            f"The output directory {target} exists and is not empty. "
            "Choose another one, or pass overwrite=True (--overwrite) to replace it."
        )
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
    """Raise a `MergeError` if the output directory is, or holds, one of the models."""
    for model in models:
        folder = model.folder.resolve()
        if target.resolve() in (folder, *folder.parents):
            raise MergeError(f"The output directory {target} holds the model {model}. Choose another one.")


def check_disk(plan: MergePlan, target: Path) -> None:
    """Raise a `MergeError` if the merged model, or what it is made from, does not fit on the disk where it goes."""
    output = plan.disk_needed - plan.bytes_to_download
    needed: Counter[Path] = Counter()
    for path, size in ((target, output), (Path(constants.HF_HUB_CACHE).absolute(), plan.bytes_to_download)):
        needed[_mount_point(path)] += size
    problems = []
    for disk, size in needed.items():
        usage = shutil.disk_usage(disk)
        if usage.free < size and usage.total > 0:  # some file systems do not tell
            problems.append(
                f"No space on the disk: {readable_size(size)} are needed, but only {readable_size(usage.free)} "
                f"are free in {disk}. Free some space, choose another output directory, or move the Hub's cache "
                "(HF_HOME)."
            )
    if problems:
        raise MergeError(problems)


def _mount_point(path: Path) -> Path:
    """The folder at which the file system of a path, which need not exist yet, is mounted."""
    return next(parent for parent in (path, *path.parents) if parent.is_mount())
