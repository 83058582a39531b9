"""Where a model is: a local folder, or a repository on the Hub at one commit."""

import glob
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from huggingface_hub import hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from neuromerge_hf.access import PUBLIC, Access
from neuromerge_hf.errors import MergeError, printable
from neuromerge_hf.storage.file_state import State, state_of
from neuromerge_hf.storage.files import CARD, CHECKPOINT_FILES, COMPANIONS, LICENCE_FILES, weight_files
from neuromerge_hf.storage.formats import open_file, open_weights
from neuromerge_hf.storage.paths import user_path
from neuromerge_hf.storage.remote import list_sizes, open_remote, repository_sizes
from neuromerge_hf.storage.sentence_modules import module_folders
from neuromerge_hf.storage.small_files import LARGEST_CARD, check_sizes, check_small_files, read_files
from neuromerge_hf.storage.tensors import StoredTensor

METADATA = ["*.json", *COMPANIONS, *LICENCE_FILES, CARD, "recipe.yaml"]
"""Patterns of the small files: configurations, tokenizers, indexes, recipes, licences."""

WEIGHT_SUFFIXES = (".safetensors", ".bin")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Location:
    """A model in a local folder, or in a repository on the Hub.

    Attributes:
        id: the folder or the id that the user gave, without the revision. An id may include a subfolder.
        folder: where the files are on this machine.
        commit: the commit on the Hub; None for a local folder.
        access: how files are downloaded from the Hub.
        weight_names: the possible names of the weight file or index. The first that exists is used.
        notes: remarks on the weight files for the report.
        listed: the size in bytes of each file of this folder on the Hub, if it is known already.
    """

    id: str
    folder: Path
    commit: str | None = None
    access: Access = field(default=PUBLIC, repr=False)
    weight_names: tuple[str, ...] = CHECKPOINT_FILES
    notes: list[str] = field(default_factory=list, init=False, repr=False, compare=False)
    listed: dict[str, int] | None = field(default=None, repr=False, compare=False)
    # The state of each watched file, None for one that does not exist; and the files that were there at first. Copies
    # of a location, which differ in `weight_names`, share both.
    _watched: dict[Path, State | None] = field(default_factory=dict, repr=False, compare=False)
    _found: set[Path] = field(default_factory=set, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.id}@{self.commit[:8]}" if self.commit else self.id

    @property
    def name(self) -> str:
        """The last part of the id, which names the model in the report."""
        # A link is not resolved, because users choose its name.
        name = Path(self.id).name if self.commit else os.path.basename(os.path.abspath(self.folder))
        return name if printable(name) == name else re.sub(r"[^\w.-]", "_", name)  # files have this name

    @property
    def public_name(self) -> str:
        """The model's name in published texts: the id and the commit, or only the last part of a folder's path."""
        return str(self) if self.commit else self.name

    @property
    def repo(self) -> str:
        """The repository on the Hub, without the subfolder."""
        return _split(self.id)[0]

    def download(self, patterns: Sequence[str], ignore: str | None = "*/*") -> None:
        """Download the matching files of a model on the Hub.

        Args:
            patterns: patterns of the files, relative to the model's folder.
            ignore: a pattern of files to leave out; files in subfolders by default.

        Raises:
            MergeError: if the files cannot be downloaded.
        """
        _download(self.id, self.commit, self.access, patterns, ignore)

    # ---------------------------------------------------------------------------------------------------- weights

    def find_weights(self) -> Path | None:
        """The first of `weight_names` that exists, on this machine or on the Hub; None if the model has none.

        Raises:
            MergeError: if none is on this machine, and the Hub cannot be reached.
        """
        main = self._existing_weights()
        if main is None and self.commit and self._sizes is None:
            self.download(self.weight_names)
            main = self._existing_weights()
            if main is None:  # offline, the client returns a snapshot that lacks them
                raise MergeError(
                    f"The weights of {self} are not in the Hub's cache, and the Hub cannot be reached. "
                    "Check the network, or HF_HUB_OFFLINE."
                )
        return main

    def open_weights(self, main: Path) -> dict[str, StoredTensor]:
        """Open the tensors of the weight files by name. Headers of files not downloaded yet are read from the Hub.

        Args:
            main: the weight file or index, see `find_weights`.

        Raises:
            MergeError: if a file is missing, truncated or damaged.
        """
        self.watch([main] if main.is_file() else [])
        notes: list[str] = []
        tensors = open_weights(main, self._has, self._open, notes)
        self.notes.extend(note for each in notes if (note := f"{self.public_name}: {each}") not in self.notes)
        return tensors

    def missing_weights(self) -> dict[Path, int]:
        """The size in bytes of each weight file that is not downloaded yet, by path.

        Raises:
            MergeError: if the Hub cannot be reached, or an index is damaged or lists a file that does not exist.
        """
        main = self.find_weights() if self.commit else None
        files = weight_files(main, self._has) if main else []
        return {file: (self._sizes or {})[file.name] for file in files if not file.is_file()}

    @property
    def has_headers(self) -> bool:
        """Whether `open_weights` works now. Only ``.bin`` files must be downloaded first: they have no header."""
        try:
            return all(file.suffix == ".safetensors" for file in self.missing_weights())
        except MergeError:  # opening the weights reports the problem
            return True

    def fetch_weights(self) -> None:
        """Download the weight files that are not on this machine yet.

        Raises:
            MergeError: if they cannot be downloaded.
        """
        missing = self.missing_weights()
        if missing:
            self.download([glob.escape(file.name) for file in missing])

    # ---------------------------------------------------------------------------------------------------- changed files

    def watch(self, files: Iterable[Path]) -> None:
        """Note the state of files before they are read. The state of a file that is watched already stays."""
        for file in files:
            self._watched.setdefault(file, state_of(file))

    def watch_folder(self) -> None:
        """Watch the files in the folder that a merge reads or copies, but for shards: opening weights watches them."""
        self._found.update(read_files(self.folder))
        self.watch(self._found)

    def check_unchanged(self) -> None:
        """Raise a `MergeError` if a watched file has changed, or a file that a merge would read was added."""
        changed = [file for file, state in self._watched.copy().items() if state_of(file) != state]
        what = "has changed since it was opened for"
        if not (changed or self.commit):  # files of one commit may be downloaded later
            changed = [file for file in read_files(self.folder) if file not in self._found]
            what = "was added since the start of"
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise MergeError(
                f"{changed[0]}{more} {what} this merge. Run it again, and leave the files as they are while it runs."
            )

    @cached_property
    def _sizes(self) -> dict[str, int] | None:
        if self.listed is not None:
            return self.listed
        return list_sizes(*_split(self.id), self.commit, self.access) if self.commit else {}

    @cached_property
    def _opened(self) -> dict[tuple[Path, bool], Mapping[str, StoredTensor]]:
        return {}

    def _existing_weights(self) -> Path | None:
        return next((self.folder / name for name in self.weight_names if self._has(self.folder / name)), None)

    def _has(self, file: Path) -> bool:
        return file.is_file() or file.name in (self._sizes or {})

    def _open(self, file: Path) -> Mapping[str, StoredTensor]:
        """Open the tensors of a file. Its header is read once, and once again after the file was downloaded."""
        is_here = file.is_file()
        if is_here:
            self.watch([file])
        if (file, is_here) not in self._opened:
            self._opened[file, is_here] = open_file(file) if is_here else self._open_remote(file)
        return self._opened[file, is_here]

    def _open_remote(self, file: Path) -> Mapping[str, StoredTensor]:
        repo, prefix = _split(self.id)
        url = hf_hub_url(repo, prefix + file.name, revision=self.commit)
        return open_remote(file, url, (self._sizes or {})[file.name], self.access.token)


def locate(model: str | os.PathLike[str], *, revision: str | None = None, access: Access = PUBLIC) -> Location:
    """Find a model, and download its small files if it is on the Hub.

    Args:
        model: a folder, or an id on the Hub. An id may include a subfolder (``owner/name/folder``), and may end in
            ``@revision`` (a branch, a tag or a commit).
        revision: the revision for an id without one.
        access: how files are downloaded from the Hub.

    Raises:
        MergeError: if the folder or repository does not exist or cannot be accessed.
    """
    text = os.fspath(model)
    if "\0" in text or not _is_unicode(text):
        raise MergeError(f"The path {text!r} is not valid UTF-8, so that a recipe cannot name it. Rename the folder.")
    folder = user_path(text, "The model")
    if folder.is_dir():
        location = _watched(Location(text, folder))
        check_small_files(folder)
        return location
    if folder.exists():
        raise MergeError(
            f"{text} is a file. Give the folder that holds the model's config.json or adapter_config.json."
        )
    name, _, named = text.partition("@")
    if text.startswith((".", "/", "~")) or not all(name.split("/")) or ".." in name.split("/"):
        raise MergeError(f"{text} is not a folder on this machine, and no id of a model on the Hub.")
    repo, prefix = _split(name)
    commit, sizes = repository_sizes(repo, prefix, named or revision, access) or (None, {})
    check_sizes(name, sizes)
    metadata = METADATA
    if sizes.get(CARD, 0) > LARGEST_CARD:
        logger.warning("The card of %s is not read: it has more than %d bytes.", name, LARGEST_CARD)
        metadata = [pattern for pattern in METADATA if pattern != CARD]
    snapshot = _download(name, named or revision, access, metadata)
    if prefix and not (snapshot / prefix).is_dir():
        raise MergeError(
            f"{name} is not a folder on this machine, and the model {repo} on the Hub (at {snapshot.name[:8]}) has no "
            f"model in a folder {prefix.rstrip('/')}. Check the spelling and the revision."
        )
    if folders := module_folders(snapshot / prefix):
        _download(name, snapshot.name, access, [f"{glob.escape(folder)}/*" for folder in folders], ignore=None)
    if access.force_download:  # what is not there yet is downloaded later, and once
        kept = [path.name for path in (snapshot / prefix).glob("*") if path.suffix in WEIGHT_SUFFIXES]
        _download(name, snapshot.name, access, [glob.escape(file) for file in kept])
    listed = sizes if commit == snapshot.name else None
    location = _watched(Location(name, snapshot / prefix, commit=snapshot.name, access=access, listed=listed))
    check_small_files(location.folder, is_cached=True)
    return location


def _is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8. The names of files can hold other bytes."""
    return text.encode(errors="replace").decode() == text


def _watched(location: Location) -> Location:
    location.watch_folder()
    return location


def _split(model_id: str) -> tuple[str, str]:
    """Split an id into the repository and the subfolder, which ends in a slash ("" for the top of the repository)."""
    owner, _, rest = model_id.partition("/")
    name, _, folder = rest.partition("/")
    return f"{owner}/{name}" if name else owner, f"{folder}/" if folder else ""


def _download(
    model_id: str, revision: str | None, access: Access, patterns: Sequence[str], ignore: str | None = "*/*"
) -> Path:
    """Download the matching files of a model. Returns the snapshot's folder, whose name is the commit."""
    repo, prefix = _split(model_id)
    at = f"{model_id} at revision {revision}" if revision else model_id
    inside = glob.escape(prefix)
    cache = None if access.cache_dir is None else user_path(access.cache_dir, "cache_dir")
    try:
        snapshot = snapshot_download(
            repo,
            revision=revision,
            token=access.token,
            local_files_only=access.local_files_only,
            force_download=access.force_download,
            cache_dir=cache,
            allow_patterns=[inside + pattern for pattern in patterns],
            ignore_patterns=inside + ignore if ignore else None,
        )
        return Path(snapshot)
    except HFValidationError as error:
        raise MergeError(
            f"{model_id!r} is neither a folder on this machine nor a valid id on the Hub ({error})."
        ) from error
    except GatedRepoError as error:
        raise MergeError(
            f"{repo} is gated: accept its terms on its page on the Hub, then log in with `hf auth login`, "
            "or pass token=."
        ) from error
    except RevisionNotFoundError as error:
        raise MergeError(
            f"{repo} exists on the Hub, but has no revision {revision!r}. Check its branches and tags."
        ) from error
    except RepositoryNotFoundError as error:
        raise MergeError(
            f"{model_id} is neither a folder on this machine nor a model on the Hub. "
            "Check the spelling; for a private model log in with `hf auth login` or pass token=."
        ) from error
    except LocalEntryNotFoundError as error:
        raise MergeError(
            f"{at} is not a folder on this machine, is not in the Hub's cache, and "
            + (
                "local_files_only=True (--local-files-only) forbids a download. Check the spelling, or leave that out."
                if access.local_files_only
                else "the Hub cannot be reached. Check the spelling and the network."
            )
        ) from error
    except HfHubHTTPError as error:
        raise MergeError(f"The Hub refused to give {at}: {error}") from error
