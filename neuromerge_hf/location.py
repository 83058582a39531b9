"""Where a model is: a local folder, or a repository on the Hub at one commit."""

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from neuromerge_hf.checkpoint import COMPANIONS, indexed_files
from neuromerge_hf.errors import MergeError

METADATA = ["*.json", *COMPANIONS, "README.md", "recipe.yaml"]
"""Small files: configurations, tokenizers, indexes, recipes."""

SAFETENSORS = ["adapter_model.safetensors", "model.safetensors"]
PICKLES = ["adapter_model.bin", "pytorch_model.bin"]
SUBFOLDERS = ["*/*"]


@dataclass(frozen=True)
class Location:
    """A model's files.

    Attributes:
        id: what the user wrote, without the revision.
        folder: where the files are on this machine.
        commit: the commit on the Hub; None for a local folder.
        token: passed on to downloads.
    """

    id: str
    folder: Path
    commit: str | None = None
    token: str | bool | None = None

    def __str__(self) -> str:
        return f"{self.id}@{self.commit[:8]}" if self.commit else self.id

    @property
    def name(self) -> str:
        """The last part of the id, by which the report names the model."""
        return Path(self.id).name if self.commit else self.folder.resolve().name

    def fetch_weights(self) -> None:
        """Download the weight files that are not here yet: safetensors, or ``.bin`` where there are none.

        Raises:
            MergeError: if they cannot be had, or an index names a file outside its folder.
        """
        if self.commit is None:
            return
        for names in (SAFETENSORS, PICKLES):
            indexes = [self.folder / f"{name}.index.json" for name in names]
            shards = [path.name for index in indexes if index.is_file() for path in indexed_files(index)]
            download(self.id, self.commit, self.token, [*names, *shards])
            if any((self.folder / name).is_file() for name in [*names, *shards]):
                return


def locate(model: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None) -> Location:
    """Find a model and fetch its small files.

    Args:
        model: a folder, or an id on the Hub, which may end in ``@revision`` (a branch, a tag or a commit).
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
    repo, _, named = text.partition("@")
    if text.startswith((".", "/", "~")) or repo.count("/") > 1:
        raise MergeError(f"{text} is not a folder on this machine, and no id of a model on the Hub.")
    revision = named or revision
    snapshot = download(repo, revision, token, METADATA)
    return Location(repo, snapshot, commit=snapshot.name, token=token)


def download(
    repo: str,
    revision: str | None,
    token: str | bool | None,
    patterns: list[str],
    ignore: list[str] | None = SUBFOLDERS,
) -> Path:
    """Download the files of a repository that match; returns the snapshot's folder, which is named by its commit."""
    at = f"{repo} at revision {revision}" if revision else repo
    try:
        return Path(
            snapshot_download(repo, revision=revision, token=token, allow_patterns=patterns, ignore_patterns=ignore)
        )
    except HFValidationError as error:
        raise MergeError(
            f"{repo!r} is neither a folder on this machine nor a valid id on the Hub ({error})."
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
            f"{repo} is neither a folder on this machine nor a model on the Hub. "
            "Check the spelling; for a private model log in with `hf auth login` or pass token=."
        ) from error
    except LocalEntryNotFoundError as error:
        raise MergeError(
            f"{at} is not a folder on this machine, is not in the Hub's cache, and the Hub cannot be reached. "
            "Check the spelling and the network."
        ) from error
    except HfHubHTTPError as error:
        raise MergeError(f"The Hub refused to give {at}: {error}") from error
