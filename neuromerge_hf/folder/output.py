"""The first check of an output directory, which needs no other module and is made before torch is imported."""

from pathlib import Path

from neuromerge_hf.errors import MergeError


def check_unused(target: Path, overwrite: bool) -> None:
    """Raise a `MergeError` if the output directory is a file, or holds something that must not be replaced."""
    if target.exists() and not target.is_dir():
        raise MergeError(f"The output directory {target} is a file.")
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise MergeError(
            f"The output directory {target} exists and is not empty. Choose another one, or pass overwrite=True "
            "(--overwrite) to replace an earlier merge."
        )
