"""Which files of a folder belong to a merged model. They are copied, uploaded, hashed and replaced together."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

from neuromerge_hf.errors import MergeError
from neuromerge_hf.folder.recipe import RECIPE_NAME
from neuromerge_hf.folder.report import REPORT_NAME
from neuromerge_hf.storage.files import (
    CARD,
    CHECKPOINT_FILES,
    COMPANIONS,
    HEADS,
    LICENCE_FILES,
    TOKENIZER_FILES,
    find_weights,
    weight_files,
)
from neuromerge_hf.storage.formats import open_weights
from neuromerge_hf.storage.hashing import file_hash

BESIDE_CARD = ("*.png", *LICENCE_FILES)
"""The card's pictures, and the parents' licences, which must accompany the weights."""

BESIDE_WEIGHTS = ("config.json", *COMPANIONS, RECIPE_NAME, REPORT_NAME, CARD, *BESIDE_CARD)
"""The files of a merge at the top of its folder. Others may be there: a trainer's state, logs, private notes."""

IN_HEADS = (f"{HEADS}/*/*.json", f"{HEADS}/*/*.safetensors")

WEIGHTS = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")

LOADED = (*WEIGHTS, *TOKENIZER_FILES, "generation_config.json", f"{HEADS}/*")
"""Files that transformers or `AutoMergedModel` load together with the weights, even if another merge wrote them."""


def merged_files(folder: Path) -> dict[str, Path]:
    """The files of a merged model, including links to files, by their path relative to its folder.

    Raises:
        MergeError: if the folder has no weights, or a weight file is missing.
    """
    main = find_weights(folder, CHECKPOINT_FILES[:2])
    if main is None:
        raise MergeError(f"{folder} is not a merged model: it has no model.safetensors.")
    beside = [path for path in folder.iterdir() if any(fnmatch(path.name, pattern) for pattern in BESIDE_WEIGHTS)]
    heads = [path for pattern in IN_HEADS for path in folder.glob(pattern)]
    paths = {path for path in (main, *weight_files(main), *beside, *heads) if path.is_file()}
    files = {path.relative_to(folder).as_posix(): path for path in sorted(paths)}
    return {name: path for name, path in files.items() if not any(part.startswith(".") for part in name.split("/"))}


def files_to_push(folder: Path) -> dict[str, Path]:
    """The files of a merged model to upload, by their path in the repository.

    Links are left out because they can point to any file on this machine.

    Raises:
        MergeError: if the folder is not a complete merge.
    """
    if not folder.is_dir():
        raise MergeError(f"{folder} is not a folder. Give the output directory of a merge.")
    files = merged_files(folder)
    missing = [name for name in ("config.json", RECIPE_NAME, REPORT_NAME) if name not in files]
    if missing:
        raise MergeError(
            f"{folder} is not a complete merge: it has no {' and no '.join(missing)}. "
            "Give the output directory of `neuromerge merge`, or merge again."
        )
    main = find_weights(folder, CHECKPOINT_FILES[:2])
    assert main is not None
    for path in (main, *weight_files(main), *(files[name] for name in ("config.json", RECIPE_NAME, REPORT_NAME))):
        if path.is_symlink():
            raise MergeError(f"{path} is a link, and links are not uploaded: push the folder where the files are.")
    open_weights(main)  # detects truncated files before the upload
    return {name: path for name, path in files.items() if not path.is_symlink()}


def is_stale(name: str) -> bool:
    """Whether a file in the repository would be loaded as part of the merge although the merge has no such file."""
    return any(fnmatch(name, pattern) for pattern in LOADED)


def copy_merge(source: Path, target: Path) -> None:
    """Copy a merged model, and remove other weights from the target. A card in the target is kept."""
    files = merged_files(source)
    for name, path in files.items():
        if name != CARD or not (target / CARD).exists():
            copy_file(path, target / name)
    _remove_other_weights(target, files)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, unless source and target are the same file."""
    if not (target.exists() and target.samefile(source)):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # writing to a link would overwrite the file that it points to
        shutil.copyfile(source, target)


def remove_older_weights(folder: Path) -> None:
    """Remove the weights of earlier saves: transformers prefers ``model.safetensors`` even to newer shards."""
    mains = [folder / name for name in CHECKPOINT_FILES[:2] if (folder / name).is_file()]
    if mains:
        newest = max(mains, key=lambda path: path.stat().st_mtime_ns)
        _remove_other_weights(folder, {path.name: path for path in (newest, *weight_files(newest))})


def _remove_other_weights(folder: Path, files: dict[str, Path]) -> None:
    for path in folder.iterdir():
        if path.name not in files and any(fnmatch(path.name, pattern) for pattern in WEIGHTS):
            path.unlink()


def hash_weights(folder: Path) -> dict[str, str]:
    """The sha256 of each weight file and each head of a merged model, by its path relative to the folder."""
    return _hashes(folder, sorted(folder.glob("*.safetensors"))) | hash_heads(folder)


def hash_heads(folder: Path) -> dict[str, str]:
    """The sha256 of each head of a merged model, by its path relative to the folder."""
    return _hashes(folder, sorted(folder.glob(f"{HEADS}/*/*.safetensors")))


def _hashes(folder: Path, paths: list[Path]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:
        digests = pool.map(file_hash, paths)
        return {path.relative_to(folder).as_posix(): digest for path, digest in zip(paths, digests, strict=True)}
