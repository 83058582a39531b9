"""Pushing the folder of a merged model to the Hub, in one commit."""

import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # re-exported lazily

from neuromerge_hf.errors import MergeError, printable
from neuromerge_hf.folder.assets import files_to_push, is_stale, links_inside
from neuromerge_hf.folder.recipe import RECIPE_NAME, published_recipe
from neuromerge_hf.folder.report import REPORT_NAME, load_report
from neuromerge_hf.hub.card import add_tags, card_to_continue, paths_in, read_card, validate_card
from neuromerge_hf.hub.errors import hub_errors_as_merge_errors
from neuromerge_hf.model_cards import write_card
from neuromerge_hf.model_cards.benchmarks import PATH as BENCHMARKS
from neuromerge_hf.model_cards.benchmarks import benchmark_results
from neuromerge_hf.storage.files import CARD
from neuromerge_hf.storage.paths import user_path
from neuromerge_hf.typed import check_value

logger = logging.getLogger(__name__)


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
    """Upload a merged model with its model card, as one commit.

    The recipe is published with the names of local folders instead of their paths on this machine.

    The card is also written to the folder. Hand-written text in the repository's card is kept. If there is none, that
    of the folder's card is kept. If there is text in both, the repository's is kept, and the folder's card is copied to
    ``README.before-push.md``.

    Files that the repository already has are not sent again. Weights, heads and tokenizer files of an earlier model are
    deleted from it unless the folder has files of the same names.

    Args:
        folder: the folder that `merge` or the `save_pretrained` of a merged model wrote.
        repo_id: the repository, ``owner/name``, or ``name`` for one of your own. It is made if it does not exist.
        private: whether a new repository is private. By default its owner's settings decide.
        token: your token for the Hub; by default the one you logged in with.
        revision: the branch. It is made from the main branch if it does not exist.
        create_pr: open a pull request instead of committing to the branch.
        commit_message, commit_description: the first line and the rest of the commit's message.
        template: the path of a Jinja template of your own for the card.
        tags: further tags for the card.

    Returns:
        The commit, with the address of the pull request if one was asked for.

    Raises:
        MergeError: if the folder is not a complete merge, the Hub rejects the card's metadata, or the push fails. The
            message says whether anything was published, and a failed push's gives the command to resume.
    """
    texts = {"revision": revision, "commit_message": commit_message, "commit_description": commit_description}
    for name, value in texts.items():
        check_value(name, value, str | None)
    check_value("tags", tags, Sequence[str])
    check_value("private", private, bool | None)
    check_value("create_pr", create_pr, bool)
    check_value("token", token, str | bool | None)
    if template is not None:
        template = user_path(template, "template")
    folder = user_path(folder, "folder").absolute()
    files_to_push(folder)
    for link in links_inside(folder):
        logger.warning("%s is not uploaded, because it is or lies behind a link.", printable(link))
    check_repo_id(repo_id)
    options = {
        "--revision": revision,
        "--commit-message": commit_message,
        "--commit-description": commit_description,
        "--template": template,
    }
    again = _command(folder, repo_id, options, private=bool(private), create_pr=create_pr, tags=tags)
    api = HfApi(token=token)
    translated = partial(hub_errors_as_merge_errors, repo_id, folder, again, token)

    with translated():
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        found, branch_exists = _find_branch(api, repo_id, revision, create_pr)
        theirs = read_card(api, found) if found else None
    if found and private and not found.private:
        raise MergeError(
            f"{repo_id} is public, and stays so. Make it private in its settings on the Hub first, push to another "
            f"repository, or leave private out (--private). Nothing was published. The model is complete in {folder}."
        )
    weights = _weights_to_push(folder)
    card = write_card(folder, repo_id, template=template, previous=card_to_continue(folder / CARD, theirs))
    if tags:
        add_tags(card, tags)
    with translated():
        validate_card(card)
        if found is None:
            api.create_repo(repo_id, private=private, exist_ok=True)
            found = api.model_info(repo_id)
        if not branch_exists:
            assert revision is not None
            api.create_branch(repo_id, branch=revision, revision=found.sha, exist_ok=True)
    files: dict[str, Path | bytes] = {**files_to_push(folder)}
    files[RECIPE_NAME] = published_recipe(folder, load_report(folder).model_names).encode()
    if benchmarks := benchmark_results(load_report(folder)):
        files[BENCHMARKS] = benchmarks.encode()
    additions = [weights.get(path) or CommitOperationAdd(path, file) for path, file in files.items()]
    stale = [path for path in paths_in(found) if path not in files and (is_stale(path) or path == BENCHMARKS)]

    def is_unchanged() -> bool:  # the branch does not show whether a pull request was opened
        return not create_pr and api.model_info(repo_id, revision=revision).sha == found.sha

    with translated(is_unchanged=is_unchanged):
        return api.create_commit(
            repo_id,
            [
                *additions,
                *(CommitOperationDelete(path, is_folder=False) for path in stale),
            ],
            commit_message=commit_message or "Upload merged model",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=found.sha,
        )


def _weights_to_push(folder: Path) -> dict[str, CommitOperationAdd]:
    """The uploads of the weight files, by their path in the repository. The Hub's client hashes each file once.

    Raises:
        MergeError: if a file's hash is not the one in the report, because the card would then describe other weights.
            A report of an earlier version has no hashes, and is not checked.
    """
    expected = load_report(folder).weights
    weights = {
        path: CommitOperationAdd(path, file)
        for path, file in files_to_push(folder).items()
        if path.endswith(".safetensors")
    }
    problems = [
        f"{folder / path} has changed since {REPORT_NAME} was written: its sha256 is {found}, not "
        f"{expected.get(path)}. Save the model again with save_pretrained, or merge again. Nothing was published."
        for path, upload in weights.items()
        if expected and (found := upload.upload_info.sha256.hex()) != expected.get(path)
    ]
    if problems:
        raise MergeError(problems)
    return weights


def _command(
    folder: Path,
    repo_id: str,
    options: Mapping[str, str | os.PathLike[str] | None],
    *,
    private: bool,
    create_pr: bool,
    tags: Sequence[str],
) -> str:
    """The command line that pushes with the same arguments, except the token."""
    words = ["neuromerge", "push", str(folder), repo_id]
    words += ["--private"] * private + ["--create-pr"] * create_pr
    words += [word for option, value in options.items() if value is not None for word in (option, os.fspath(value))]
    words += [word for tag in tags for word in ("--tag", tag)]
    return shlex.join(words)


def check_repo_id(repo_id: str, parameter: str = "repo_id") -> None:
    """Raise a `MergeError` that names the parameter if `repo_id` cannot be the id of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise MergeError(
            f"{parameter}={repo_id!r} is no id of a repository on the Hub, such as 'owner/name': {error}"
        ) from error


def _find_branch(api: HfApi, repo_id: str, revision: str | None, create_pr: bool) -> tuple[ModelInfo | None, bool]:
    """The repository at the branch, or at the main branch if that does not exist, and whether the branch exists."""
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
