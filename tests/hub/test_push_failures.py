"""Whatever breaks during a push: nothing is published, nothing is lost, and one command goes on."""

import math
import shlex
import shutil
import types

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from typer.testing import CliRunner

from neuromerge_hf import MergeError, merge
from neuromerge_hf.cli import app
from neuromerge_hf.hub.push import push
from tiny_models import contents, load, logits, save_fine_tune, save_llama

COMMIT, BATCH, PUT = "POST .*/commit/", "POST .*/objects/batch", "PUT /lfs/"

LIMIT = "Private repository storage limit reached, please upgrade your plan to increase your private storage limit."

FAILURES = {
    "no-access": (r"GET /api/models/", 401, "Invalid username or password.", "Log in with `hf auth login`"),
    "token-expired": (COMMIT, 401, "Invalid credentials", "does not accept your token"),
    "read-only-token": (COMMIT, 403, "Forbidden: pass `create_pr=1`", "your token may not write to .*--create-pr"),
    "deleted-meanwhile": (r"POST .*/preupload/", 404, "Repository not found", "is not there any more"),
    "locked": (COMMIT, 409, "Another commit is in progress", "somebody else changed"),
    "pushed-meanwhile": (COMMIT, 412, "A commit has happened since", r"somebody else changed .*has happened since"),
    "too-many-commits": (COMMIT, 429, "You have been rate-limited", "takes no more requests.*Wait 3600 s"),
    "too-many-requests": (BATCH, 429, "You have been rate-limited", "takes no more requests"),
    "full-account": (BATCH, 403, LIMIT, r"your storage on the Hub is full.*Free some"),
    "too-large": (PUT, 413, "Payload too large", "your storage on the Hub is full"),
    "storage-down": (PUT, 503, "Service Unavailable", "problem of its own: it answers 503"),
    "hub-down": (".*", 502, "Bad Gateway", "problem of its own: it answers 502"),
    "commit-breaks": (COMMIT, 500, "Internal Error", "problem of its own: it answers 500"),
    "upload-cut": (PUT, "request", "", "the connection to the Hub broke off"),
    "commit-cut": (COMMIT, "request", "", "the connection to the Hub broke off"),
    "card-cut": ("GET .*README.md", "answer", "", "the connection to the Hub broke off"),
    "unreachable": (".*", "request", "", "the connection to the Hub broke off"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    base = save_llama(root / "base")
    for name, seed in {"earlier": 1, "merged": 2}.items():
        expert = save_fine_tune(base, root / f"expert-{name}", seed=seed)
        merge([expert], root / name, base_model=base)
    return root


@pytest.fixture
def merged(made, tmp_path):
    return shutil.copytree(made / "merged", tmp_path / "with a space")


@pytest.fixture
def impatient(monkeypatch):
    """The client asks again for half a minute where that may help. Here it does not wait in between."""
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", types.SimpleNamespace(sleep=lambda seconds: None))


def fail(hub, requests: str, how: int | str, words: str = "", times: float = math.inf) -> None:
    if isinstance(how, int):
        retry_after = {"Retry_After": "3600"} if how == 429 and requests == COMMIT else {}
        hub.fail(requests, how, words, times=times, code="RepoNotFound" if how == 404 else "", **retry_after)
    else:
        hub.fail(requests, cut=how, times=times)


def run(message: str):
    """Run the command that a message ends with."""
    command = message.rpartition("\n")[2]
    return CliRunner().invoke(app, shlex.split(command)[1:])


@pytest.mark.parametrize("name", FAILURES)
def test_a_push_that_fails_publishes_nothing_loses_nothing_and_is_gone_on_with(hub, made, merged, impatient, name):
    requests, how, words, sentence = FAILURES[name]
    repo_id = f"failing/{name}"
    hub.add_folder(repo_id, made / "earlier")
    before, on_disk = hub.files(repo_id), contents(merged)
    fail(hub, requests, how, words)
    with pytest.raises(MergeError, match=sentence) as caught:
        push(merged, repo_id)
    message = str(caught.value)
    assert f"Nothing was published. The model is complete in {merged}." in message
    assert hub.files(repo_id) == before
    assert hub.repos[repo_id].branches.keys() == {"main"}
    assert on_disk == contents(merged)
    assert caught.value.__cause__ is not None
    hub.forget_traffic()  # and repair it
    done = run(message)
    assert done.exit_code == 0, done.output
    assert torch.equal(logits(load(repo_id)), logits(load(merged)))


@pytest.mark.parametrize(("how", "sentence"), [(403, "You don't have the rights"), (401, "hf auth login")])
def test_a_repository_that_may_not_be_made_is_not_made(hub, merged, how, sentence):
    fail(hub, "POST /api/repos/create", how, "You don't have the rights to create a model under the namespace")
    with pytest.raises(MergeError, match=sentence):
        push(merged, f"foreign/{how}")
    assert f"foreign/{how}" not in hub.repos


def test_the_command_says_all_that_was_asked_for_but_the_token(hub, merged, tmp_path):
    template = tmp_path / "it's a card.jinja"
    template.write_text("# Mine\n")
    fail(hub, COMMIT, 403, "hf_secret may not write")
    options = {"private": True, "revision": "next", "commit_message": "It's $HOME\nand more", "template": template}
    with pytest.raises(MergeError) as caught:
        push(merged, "failing/options", token="hf_secret", commit_description="why", **options)
    message = str(caught.value)
    command = shlex.split(message.partition("\n")[2])
    assert command == [
        *("neuromerge", "push", str(merged), "failing/options", "--private", "--revision", "next"),
        *("--commit-message", "It's $HOME\nand more", "--commit-description", "why", "--template", str(template)),
    ]
    assert "hf_secret" not in message
    assert isinstance(caught.value.__cause__, HfHubHTTPError)
    with pytest.raises(MergeError, match=r"push .* failing/options --create-pr$"):
        push(merged, "failing/options", create_pr=True)


def test_a_connection_that_breaks_once_is_taken_up_again(hub, merged, impatient):
    fail(hub, PUT, "request", times=1)
    fail(hub, BATCH, 503, times=2)
    push(merged, "failing/once")
    assert torch.equal(logits(load("failing/once")), logits(load(merged)))


def test_what_was_sent_before_the_failure_is_not_sent_again(hub, merged):
    fail(hub, COMMIT, 403)
    with pytest.raises(MergeError) as caught:
        push(merged, "failing/late")
    large = sum((merged / name).stat().st_size for name in ("model.safetensors", "neuromerge.png"))
    assert hub.bytes_uploaded["failing/late"] == large
    hub.forget_traffic()
    assert run(str(caught.value)).exit_code == 0
    assert hub.bytes_uploaded["failing/late"] == 0
    assert "model.safetensors" in hub.files("failing/late")


def test_a_commit_whose_answer_is_lost_is_not_said_to_be_none(hub, merged):
    fail(hub, COMMIT, "answer", times=1)
    with pytest.raises(MergeError, match="Whether the commit was taken is not known") as caught:
        push(merged, "failing/lost")
    commit = hub.repos["failing/lost"].resolve("main")
    hub.forget_traffic()
    assert run(str(caught.value)).exit_code == 0
    assert not hub.bytes_uploaded
    assert hub.repos["failing/lost"].resolve("main") == commit, "it was there already"


def test_a_pull_request_whose_answer_is_lost_is_not_said_to_be_none(hub, merged):
    fail(hub, COMMIT, "answer", times=1)
    with pytest.raises(MergeError, match="not known: look at the repository, and at its pull requests"):
        push(merged, "failing/lost-request", create_pr=True)
    assert hub.files("failing/lost-request", "refs/pr/1")


def test_offline_mode_is_named(hub, merged, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MergeError, match="HF_HUB_OFFLINE is set"):
        push(merged, "failing/offline")
