"""Which files of a folder belong to a merged model. They are copied, uploaded, hashed and replaced together."""

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

from neuromerge_hf.errors import MergeError, printable
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
from neuromerge_hf.storage.location import Location
from neuromerge_hf.storage.sentence_modules import MODULES, module_files
from neuromerge_hf.storage.small_files import leads_out
from neuromerge_hf.storage.writing import copy_file

BESIDE_CARD = ("*.png", *LICENCE_FILES)
"""The card's pictures, and the parents' licences, which must accompany the weights."""

BESIDE_WEIGHTS = ("config.json", *COMPANIONS, RECIPE_NAME, REPORT_NAME, CARD, *BESIDE_CARD)
"""The files of a merge at the top of its folder. Others may be there: a trainer's state, logs, private notes."""

OWN_FILES = (CARD, "neuromerge.png", "config.json", RECIPE_NAME, REPORT_NAME)
"""The files that a card is made from, and those that are written with it."""

IN_HEADS = (f"{HEADS}/*/*.json", f"{HEADS}/*/*.safetensors")

WEIGHTS = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")

LOADED = (*WEIGHTS, *TOKENIZER_FILES, "generation_config.json", MODULES, f"{HEADS}/*")
"""Files that the libraries load together with the weights, even if another merge wrote them."""


logger = logging.getLogger(__name__)


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
    paths = {path for path in (main, *weight_files(main), *beside, *heads, *module_files(folder)) if path.is_file()}
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
    check_own_files(folder)
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
    return {name: path for name, path in files.items() if not _is_linked(path, folder)}


def links_inside(folder: Path) -> list[Path]:
    """The files of a merged model that are not uploaded, because they are links or lie in a linked folder."""
    return [path for path in merged_files(folder).values() if _is_linked(path, folder)]


def _is_linked(path: Path, folder: Path) -> bool:
    inner = path.relative_to(folder)  # the folder itself may be a link
    return any((folder / part).is_symlink() for part in (inner, *list(inner.parents)[:-1]))


def without_leading_out(paths: Iterable[Path], location: Location) -> list[Path]:
    """The paths without those that lead out of a merged model's folder, of which a warning is logged.

    The files of a model on the Hub are links that the Hub's client made.
    """
    kept = []
    for path in paths:
        outside = None if location.commit else leads_out(path, location.folder)
        if outside:
            logger.warning("%s is left out: it leads out of its folder, to %s.", printable(path), printable(outside))
        else:
            kept.append(path)
    return kept


def check_own_files(folder: Path) -> None:
    """Raise a `MergeError` if a file that a card is made from, or that is written with it, is a link.

    The card would publish the file that the link points to, or overwrite it.
    """
    links = [path for name in OWN_FILES if (path := folder / name).is_symlink()]
    if links:
        raise MergeError(
            [
                f"{path} is a link, and no card is made from links or written to them. Put a file there."
                for path in links
            ]
        )


def is_stale(name: str) -> bool:
    """Whether a file in the repository would be loaded as part of the merge although the merge has no such file."""
    return any(fnmatch(name, pattern) for pattern in LOADED)


def copy_merge(source: Path, target: Path) -> None:
    """Copy a merged model, and remove other weights from the target. A card in the target is kept."""
    found = merged_files(source)
    weights = [name for name in found if any(fnmatch(name, pattern) for pattern in WEIGHTS)]
    others = without_leading_out([found[name] for name in found if name not in weights], Location(str(source), source))
    files = {name: path for name, path in found.items() if name in weights or path in others}
    for name, path in files.items():
        if name != CARD or not (target / CARD).exists():
            copy_file(path, target / name)
    _remove_other_weights(target, files)


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
    """The sha256 of each weight file, head and module of a merged model, by its path relative to the folder."""
    return _hashes(folder, sorted(folder.glob("*.safetensors"))) | hash_beside(folder)


def hash_beside(folder: Path) -> dict[str, str]:
    """The sha256 of each head and module of a merged model, by its path relative to the folder."""
    modules = [path for path in module_files(folder) if path.suffix == ".safetensors"]
    return _hashes(folder, [*sorted(folder.glob(f"{HEADS}/*/*.safetensors")), *modules])


def _hashes(folder: Path, paths: list[Path]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:
        digests = pool.map(file_hash, paths)
        return {path.relative_to(folder).as_posix(): digest for path, digest in zip(paths, digests, strict=True)}
