"""`push`: a merged folder becomes a repository on the Hub, in one commit."""

import json
import os
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import yaml
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelInfo,
    hf_hub_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # re-exported lazily

from neuromerge_hf.errors import MergeError
from neuromerge_hf.folder.assets import CARD, files_to_push, is_stale
from neuromerge_hf.folder.recipe import RECIPE_NAME, published_recipe
from neuromerge_hf.folder.report import load_report
from neuromerge_hf.hub.errors import failures_in_a_sentence
from neuromerge_hf.model_cards import hand_written, write_card

KEPT_CARD = "README.before-push.md"


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    template: str | os.PathLike[str] | None = None,
    tags: Sequence[str] = (),
) -> CommitInfo:
    """Upload a merged model, with its model card, as one commit: nobody ever sees half of it.

    The recipe is published with the names of local folders instead of their places on this machine.

    The card is written to the folder, too. What people wrote into the repository's card stays, or into the folder's
    where there is nothing in the repository's. If there is in both, the repository's stays, since that is where most
    people write, and the folder's card is kept as ``README.before-push.md``.

    Of files that the repository has already, nothing is sent. Weights, heads and tokenizer files of an earlier model
    that the folder does not have are deleted from it.

    Args:
        folder: what `merge` or the `save_pretrained` of a merged model wrote.
        repo_id: the repository, ``owner/name``; without an owner, your own. It is made if it is not there.
        private: make a new repository private. By default, as its owner's settings say.
        token: your token for the Hub; by default the one you logged in with.
        revision: the branch. It is made, from the main branch, if it is not there.
        create_pr: open a pull request instead of committing to the branch.
        commit_message, commit_description: of the commit.
        template: a Jinja template of your own for the card.
        tags: more tags for the card.

    Returns:
        The commit, with the address of the pull request if one was asked for.

    Raises:
        MergeError: if the folder is no complete merge, the card's metadata are refused, or the push failed. Then
            nothing is published, and the message has the command that goes on.
    """
    folder = Path(folder).expanduser().absolute()
    files_to_push(folder)
    check_repo_id(repo_id)
    options = {
        "--revision": revision,
        "--commit-message": commit_message,
        "--commit-description": commit_description,
        "--template": template,
    }
    flags = ["--private"] * bool(private) + ["--create-pr"] * create_pr
    flags += [word for option, value in options.items() if value is not None for word in (option, os.fspath(value))]
    flags += [word for tag in tags for word in ("--tag", tag)]
    again = shlex.join(["neuromerge", "push", str(folder), repo_id, *flags])
    api = HfApi(token=token)
    failing = partial(failures_in_a_sentence, repo_id, folder, again, token)

    with failing():
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        found, branch_exists = _find(api, repo_id, revision, create_pr)
        theirs = _read_card(api, found) if found else None
    if found and private and not found.private:
        raise MergeError(
            f"{repo_id} is public, and stays so. Make it private in its settings on the Hub first, push to another "
            f"repository, or leave private out (--private). Nothing was published. The model is complete in {folder}."
        )
    card = write_card(folder, repo_id, template=template, previous=_previous(folder / CARD, theirs))
    if tags:
        _add_tags(card, tags)
    with failing():
        _validate(card)
        if found is None:
            api.create_repo(repo_id, private=private, exist_ok=True)
            found = api.model_info(repo_id)
        if not branch_exists:
            assert revision is not None
            api.create_branch(repo_id, branch=revision, revision=found.sha, exist_ok=True)
    files: dict[str, Path | bytes] = {**files_to_push(folder)}
    files[RECIPE_NAME] = published_recipe(folder, load_report(folder).model_names).encode()
    stale = [path for path in _paths(found) if path not in files and is_stale(path)]

    def is_unchanged() -> bool:  # a pull request would be a branch of its own
        return not create_pr and api.model_info(repo_id, revision=revision).sha == found.sha

    with failing(is_unchanged=is_unchanged):
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(path, file) for path, file in files.items()),
                *(CommitOperationDelete(path, is_folder=False) for path in stale),
            ],
            commit_message=commit_message or "Upload merged model",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=found.sha,
        )


def check_repo_id(repo_id: str, parameter: str = "repo_id") -> None:
    """Raise a `MergeError`, which names the parameter, if this cannot be the id of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise MergeError(
            f"{parameter}={repo_id!r} is no id of a repository on the Hub, such as 'owner/name': {error}"
        ) from error


def _find(api: HfApi, repo_id: str, revision: str | None, create_pr: bool) -> tuple[ModelInfo | None, bool]:
    """The repository at the branch, or at the main one if the branch is not there; and whether the branch is."""
    try:
        return api.model_info(repo_id, revision=revision), True
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None, revision in (None, "main")
    except RevisionNotFoundError:
        if create_pr or (revision and revision.startswith("refs/")):
            raise
        return api.model_info(repo_id), False


def _read_card(api: HfApi, found: ModelInfo) -> str | None:
    if CARD not in _paths(found):
        return None
    return Path(hf_hub_download(found.id, CARD, revision=found.sha, token=api.token)).read_text(encoding="utf-8")


def _previous(path: Path, theirs: str | None) -> str | None:
    """The card to continue: the repository's, with what people wrote into the folder's if there is nothing in it."""
    if theirs is None or not path.is_file():
        return theirs
    card = path.read_text(encoding="utf-8-sig")
    ours = hand_written(card)
    if ours in hand_written(theirs):
        return theirs
    if not hand_written(theirs):
        return f"{theirs.rstrip()}\n\n{ours}\n"
    path.with_name(KEPT_CARD).write_text(card, encoding="utf-8")
    return theirs


def _paths(found: ModelInfo) -> list[str]:
    return [sibling.rfilename for sibling in found.siblings or []]


def _add_tags(path: Path, tags: Sequence[str]) -> None:
    card = ModelCard.load(path)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
    card.save(path)


def _validate(path: Path) -> None:
    """Let the Hub check the card's metadata.

    Raises:
        MergeError: if it refuses them.
    """
    try:
        ModelCard.load(path).validate()
    except (ValueError, yaml.YAMLError) as error:
        raise MergeError(
            f"The metadata at the top of {path} are refused: {_refusals(str(error))}. "
            "Correct them there and push again. Nothing was published."
        ) from error


def _refusals(answer: str) -> str:
    """What the Hub found wrong, from its answer."""
    try:
        return "; ".join(error["message"] for error in json.loads(answer)["errors"])
    except (ValueError, LookupError, TypeError):  # the client found it wrong already, and says so in words
        return answer
