"""Where a model is: a local folder, or a repository on the Hub at one commit."""

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

from neuromerge_hf.errors import MergeError
from neuromerge_hf.storage.files import CHECKPOINT_FILES, COMPANIONS, LICENCE_FILES, weight_files
from neuromerge_hf.storage.formats import open_file, open_weights
from neuromerge_hf.storage.remote import list_sizes, open_remote
from neuromerge_hf.storage.tensors import StoredTensor

METADATA = ["*.json", *COMPANIONS, *LICENCE_FILES, "README.md", "recipe.yaml"]
"""Small files: configurations, tokenizers, indexes, recipes, licences."""


@dataclass(frozen=True)
class Location:
    """A model's files.

    Attributes:
        id: what the user wrote, without the revision: a folder, or a repository and perhaps a folder in it.
        folder: where the files are on this machine.
        commit: the commit on the Hub; None for a local folder.
        token: passed on to downloads.
        weight_names: how its weight file, or the index of its weight files, may be called: the first that is there.
    """

    id: str
    folder: Path
    commit: str | None = None
    token: str | bool | None = None
    weight_names: tuple[str, ...] = CHECKPOINT_FILES

    def __str__(self) -> str:
        return f"{self.id}@{self.commit[:8]}" if self.commit else self.id

    @property
    def name(self) -> str:
        """The last part of the id, by which the report names the model."""
        # The name of a link tells more than that of the folder behind it.
        return Path(self.id).name if self.commit else os.path.basename(os.path.abspath(self.folder))

    @property
    def public_name(self) -> str:
        """How a published text names it: the id and the commit, or no more of a folder than the last part."""
        return str(self) if self.commit else self.name

    @property
    def repo(self) -> str:
        """The repository on the Hub, without the folder in it."""
        return _split(self.id)[0]

    def download(self, patterns: Sequence[str], ignore: str | None = "*/*") -> None:
        """Download the files of a model on the Hub that match.

        Args:
            patterns: relative to the model's folder.
            ignore: what is left out although it matches; folders inside this one by default.

        Raises:
            MergeError: if they cannot be had.
        """
        _download(self.id, self.commit, self.token, patterns, ignore)

    # ---------------------------------------------------------------------------------------------------- weights

    def find_weights(self) -> Path | None:
        """The first of `weight_names` that the model has, here or on the Hub: a weight file or an index.

        Raises:
            MergeError: if none is here, and the Hub cannot be asked.
        """
        main = next((self.folder / name for name in self.weight_names if self._has(self.folder / name)), None)
        if main is None and self.commit and self._sizes is None:
            self.download(self.weight_names)
        return main

    def open_weights(self, main: Path) -> dict[str, StoredTensor]:
        """As `checkpoint.open_weights`. Of files that are not downloaded yet, the headers are read from the Hub.

        Raises:
            MergeError: if a file is missing, truncated or damaged.
        """
        return open_weights(main, self._has, self._open)

    def missing_weights(self) -> dict[Path, int]:
        """The weight files that are not downloaded yet, with their sizes in bytes.

        Raises:
            MergeError: as `find_weights`, or if an index is damaged or lists a file that is not there.
        """
        main = self.find_weights() if self.commit else None
        files = weight_files(main, self._has) if main else []
        return {file: (self._sizes or {})[file.name] for file in files if not file.is_file()}

    @property
    def has_headers(self) -> bool:
        """Whether the weights can be opened now: of those that are not downloaded, only safetensors have a header."""
        try:
            return all(file.suffix == ".safetensors" for file in self.missing_weights())
        except MergeError:  # opening them says what is wrong
            return True

    def fetch_weights(self) -> None:
        """Download the weight files that are not here yet: those of the first format that the model has.

        Raises:
            MergeError: if they cannot be had.
        """
        missing = self.missing_weights()
        if missing:
            self.download([glob.escape(file.name) for file in missing])

    @cached_property
    def _sizes(self) -> dict[str, int] | None:
        return list_sizes(*_split(self.id), self.commit, self.token) if self.commit else {}

    @cached_property
    def _headers(self) -> dict[Path, Mapping[str, StoredTensor]]:
        return {}

    def _has(self, file: Path) -> bool:
        return file.is_file() or file.name in (self._sizes or {})

    def _open(self, file: Path) -> Mapping[str, StoredTensor]:
        if file.is_file():
            return open_file(file)
        if file not in self._headers:
            repo, prefix = _split(self.id)
            url = hf_hub_url(repo, prefix + file.name, revision=self.commit)
            self._headers[file] = open_remote(file, url, (self._sizes or {})[file.name], self.token)
        return self._headers[file]


def locate(model: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None) -> Location:
    """Find a model and fetch its small files.

    Args:
        model: a folder, or an id on the Hub, which may go on with a folder of the repository (``owner/name/folder``),
            and may end in ``@revision`` (a branch, a tag or a commit).
        revision: the revision for an id that names none.
        token: for private and gated repositories.

    Raises:
        MergeError: if there is no such folder or repository, or no access to it.
    """
    text = os.fspath(model)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return Location(text, folder)
    if folder.exists():
        raise MergeError(
            f"{text} is a file. Give the folder that holds the model's config.json or adapter_config.json."
        )
    name, _, named = text.partition("@")
    if text.startswith((".", "/", "~")) or not all(name.split("/")) or ".." in name.split("/"):
        raise MergeError(f"{text} is not a folder on this machine, and no id of a model on the Hub.")
    snapshot = _download(name, named or revision, token, METADATA)
    repo, prefix = _split(name)
    if prefix and not (snapshot / prefix).is_dir():
        raise MergeError(
            f"{name} is not a folder on this machine, and the model {repo} on the Hub (at {snapshot.name[:8]}) has no "
            f"model in a folder {prefix.rstrip('/')}. Check the spelling and the revision."
        )
    return Location(name, snapshot / prefix, commit=snapshot.name, token=token)


def _split(model_id: str) -> tuple[str, str]:
    """The repository of an id, and the folder in it with a slash at its end ("" for the repository's own)."""
    owner, _, rest = model_id.partition("/")
    name, _, folder = rest.partition("/")
    return f"{owner}/{name}" if name else owner, f"{folder}/" if folder else ""


def _download(
    model_id: str, revision: str | None, token: str | bool | None, patterns: Sequence[str], ignore: str | None = "*/*"
) -> Path:
    """Download the files of a model that match; returns the snapshot's folder, which is named by its commit."""
    repo, prefix = _split(model_id)
    at = f"{model_id} at revision {revision}" if revision else model_id
    inside = glob.escape(prefix)
    try:
        snapshot = snapshot_download(
            repo,
            revision=revision,
            token=token,
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
            f"{at} is not a folder on this machine, is not in the Hub's cache, and the Hub cannot be reached. "
            "Check the spelling and the network."
        ) from error
    except HfHubHTTPError as error:
        raise MergeError(f"The Hub refused to give {at}: {error}") from error
