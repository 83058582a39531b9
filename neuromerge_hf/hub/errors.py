"""Errors of the Hub's client as a `MergeError` that says what went wrong and how to resume."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from neuromerge_hf.errors import MergeError, Printable, printable

QUOTA = re.compile(r"storage|quota|billing|upgrade your plan|too large", re.IGNORECASE)
"""Words in the Hub's message if the account is full. No HTTP status says only that."""


@contextmanager
def hub_errors_as_merge_errors(
    repo_id: str,
    folder: Path,
    command: str,
    token: str | bool | None,
    is_unchanged: Callable[[], bool] | None = None,
) -> Iterator[None]:
    """Turn an exception of the Hub's client in the block into a `MergeError`.

    Args:
        repo_id: the repository that is pushed to.
        folder: the folder of the model on this machine.
        command: the command that resumes the push.
        token: the user's token, which the message must not show.
        is_unchanged: asks the Hub whether the repository is unchanged, after the answer to a commit was lost.
            Returns False if that cannot be known.
    """
    try:
        yield
    except MergeError:
        raise
    except Exception as error:  # the classes of the client's exceptions depend on its version
        outcome = "Nothing was published."
        if is_unchanged and _may_be_committed(error) and not _is_true(is_unchanged):
            outcome = (
                "Whether the commit was taken is not known: look at the repository, and at its pull requests. "
                "What it has already is not sent a second time."
            )
        message = printable(
            f"The push to {repo_id} failed: {_reason(error, repo_id)} {outcome} The model is complete in {folder}. "
            "To resume:"
        )
        message = Printable(f"{message}\n  {command}")
        if isinstance(token, str) and token:
            message = Printable(message.replace(token, "..."))
        raise MergeError(message) from error


def _reason(error: Exception, repo_id: str) -> str:
    answer = next((cause for cause in _causes(error) if isinstance(cause, HfHubHTTPError)), None)
    if answer is None:
        if any(isinstance(cause, OfflineModeIsEnabled) for cause in _causes(error)):
            return "HF_HUB_OFFLINE is set, so that the Hub is not asked. Unset it."
        if any(isinstance(cause, LocalTokenNotFoundError) for cause in _causes(error)):
            return "you are not logged in. Log in with `hf auth login`, or pass token=."
        if isinstance(error, OSError | RuntimeError) or _failed_url(error):
            return f"the connection to the Hub broke off ({_first_line(_causes(error)[-1])})."
        return f"{_first_line(error)}."
    status, words = answer.response.status_code, _first_line(answer.server_message or "")
    said = f" ({words})" if words else ""
    if status == 413 or (status in (402, 403, 507) and QUOTA.search(words)):
        return f"your storage on the Hub is full{said}. Free some or enlarge your plan."
    if status == 401:
        return (
            f"the Hub does not accept your token, or there is none{said}. Log in with `hf auth login`, or pass token=."
        )
    if status == 403:
        return (
            f"your token may not write to {repo_id}{said}. Take one with the permission to write, push to a repository "
            "of your own, or open a pull request (--create-pr)."
        )
    if status == 404:
        return f"{repo_id} is not there any more, has no such revision, or is not shown to you{said}."
    if status in (409, 412):
        return f"somebody else changed {repo_id} meanwhile{said}."
    if status == 429:
        wait = answer.response.headers.get("Retry-After")
        return f"the Hub takes no more requests from you for now{said}. Wait {f'{wait} s' if wait else 'a while'}."
    if status >= 500:
        return f"the Hub has a problem of its own: it answers {status}{said}. Wait a while."
    return f"the Hub answers {status}{said}."


def _may_be_committed(error: Exception) -> bool:
    """Whether the failed request was a commit that may still have taken effect."""
    answer = next((cause for cause in _causes(error) if isinstance(cause, HfHubHTTPError)), None)
    return "/commit/" in _failed_url(error) and (answer is None or answer.response.status_code >= 500)


def _is_true(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except Exception:  # the Hub did not answer
        return False


def _failed_url(error: Exception) -> str:
    """The address of the failed request; empty if no request failed."""
    for cause in _causes(error):
        try:
            return str(cause.request.url)  # type: ignore[attr-defined]
        except (AttributeError, RuntimeError):  # the error is not a request's, or the request was never made
            continue
    return ""


def _causes(error: BaseException) -> list[BaseException]:
    """The error and the chain of its causes."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return causes


def _first_line(message: object) -> str:
    """The first line of a message, without its full stop and cut to 300 characters."""
    lines = str(message).strip().splitlines()
    return lines[0].rstrip(". ")[:300] if lines else type(message).__name__ if isinstance(message, Exception) else ""
