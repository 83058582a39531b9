"""A merged folder becomes a repository that plain transformers loads, in one commit."""

import dataclasses
import json
import shutil

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from neuromerge_hf import AutoMergedModel, MergeError, merge
from neuromerge_hf.api import add_results
from neuromerge_hf.cli import app
from neuromerge_hf.folder.report import REPORT_NAME, load_report
from neuromerge_hf.folder.results import Result
from neuromerge_hf.hub.push import push
from tiny_models import load, logits, save_classifiers, save_llamas


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_classifiers(save_llamas(tmp_path_factory.mktemp("models"), shard="20KB"))


@pytest.fixture(scope="module")
def made(models, tmp_path_factory):
    """Three merges: one file, several files, and one with heads."""
    root = tmp_path_factory.mktemp("made")
    merge([models / "math", models / "code"], root / "merged")
    merge([models / "math"], root / "sharded", base_model=models / "base", max_shard_size="20KB")
    merge([models / "topics", models / "moods"], root / "heads", base_model=models / "encoder")
    return root


@pytest.fixture
def merged(made, tmp_path):
    return shutil.copytree(made / "merged", tmp_path / "merged")


def commits(hub, repo_id: str) -> int:
    return sum(request.startswith(f"POST /api/models/{repo_id}/commit/") for request in hub.requests)


def card_of(repo_id: str) -> str:
    with open(hf_hub_download(repo_id, "README.md"), encoding="utf-8") as file:
        return file.read()


def files_of(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.endswith((".safetensors", ".index.json"))}


def test_weights_that_changed_after_the_merge_are_not_pushed_under_its_card(hub, merged):
    weights = merged / "model.safetensors"
    found = load_file(weights)
    save_file({name: 2 * tensor for name, tensor in found.items()}, weights, metadata={"format": "pt"})
    before = files_of(merged)
    with pytest.raises(
        MergeError, match=r"model\.safetensors has changed since merge_report\.json was written: its sha256"
    ):
        push(merged, "push/edited")
    assert "push/edited" not in hub.repos
    assert files_of(merged) == before


def test_a_merge_of_an_earlier_version_has_no_hashes_and_is_pushed(hub, merged, tmp_path):
    report = json.loads((merged / REPORT_NAME).read_text())
    del report["weights"]
    (merged / REPORT_NAME).write_text(json.dumps(report))
    push(merged, "push/earlier")
    assert weights(hub.files("push/earlier")) == weights(files_of(merged))
    assert "\n|  |\n" not in card_of("push/earlier"), "no empty table"
    AutoMergedModel.from_pretrained(merged).save_pretrained(tmp_path / "copied")
    push(tmp_path / "copied", "push/copied-earlier")
    assert weights(hub.files("push/copied-earlier")) == weights(files_of(merged))


def test_a_weight_file_that_the_report_does_not_list_is_refused(hub, made, tmp_path):
    folder = shutil.copytree(made / "sharded", tmp_path / "sharded")
    report = load_report(folder)
    (missing, *others) = report.weights
    dataclasses.replace(report, weights={name: report.weights[name] for name in others}).save(folder)
    with pytest.raises(MergeError, match=rf"{missing} has changed since .*, not None"):
        push(folder, "push/unlisted")
    assert "push/unlisted" not in hub.repos


# ----------------------------------------------------------------------------------------------------- what is pushed


@pytest.mark.parametrize("name", ["merged", "sharded", "heads"])
def test_plain_transformers_loads_what_was_pushed_in_one_commit(hub, made, tmp_path, name):
    folder = shutil.copytree(made / name, tmp_path / name)
    commit = push(folder, f"push/{name}")
    assert commit.oid == hub.repos[f"push/{name}"].resolve("main")
    assert commits(hub, f"push/{name}") == 1
    assert torch.equal(logits(load(f"push/{name}")), logits(load(folder)))
    pushed = hub.files(f"push/{name}")
    assert pushed.pop(".gitattributes")
    local = files_of(folder)
    assert pushed.keys() == local.keys()
    assert {file for file in local if pushed[file] != local[file]} == {"recipe.yaml"}, (
        "even the card is as it was pushed"
    )
    assert not any(str(made.parent).encode() in data for data in pushed.values())
    assert {"recipe.yaml", "merge_report.json", "README.md", "tokenizer.json"} <= pushed.keys()
    ModelCard.load(f"push/{name}").validate()


def test_models_of_the_hub_are_merged_and_pushed_back_to_it(hub, models, tmp_path):
    base = hub.add_folder("cycle/base", models / "base")
    hub.add_folder("cycle/math", models / "math", revision="v1")
    adapter = shutil.copytree(models / "code", tmp_path / "code")
    text = (adapter / "adapter_config.json").read_text().replace(str(models / "base"), "cycle/base")
    (adapter / "adapter_config.json").write_text(text)
    hub.add_folder("cycle/code", adapter)
    merge(["cycle/math@v1", "cycle/code"], tmp_path / "merged")
    push(tmp_path / "merged", "cycle/merged")
    assert base in hub.files("cycle/merged")["recipe.yaml"].decode()
    merge([models / "math", models / "code"], tmp_path / "local", base_model=models / "base")
    assert torch.equal(logits(load("cycle/merged")), logits(load(tmp_path / "local")))


def test_only_files_of_the_merge_are_uploaded(hub, merged, tmp_path):
    (tmp_path / "secret").write_text("private")
    (merged / "spiece.model").symlink_to(tmp_path / "secret")
    for name in (
        "optimizer.pt",
        "notes.txt",
        ".env",
        ".cache/x.json",
        "checkpoint-1/model.safetensors",
        "heads/a.json~",
    ):
        (merged / name).parent.mkdir(exist_ok=True)
        (merged / name).write_text("private")
    push(merged, "push/explicit")
    assert b"private" not in hub.files("push/explicit").values()
    assert (merged / "optimizer.pt").is_file()


def test_a_private_repository_is_made_private_and_a_public_one_is_not_taken_for_one(hub, merged):
    push(merged, "push/private", private=True)
    assert hub.repos["push/private"].private
    push(merged, "push/private", private=True)
    push(merged, "push/public")
    with pytest.raises(MergeError, match="push/public is public, and stays so"):
        push(merged, "push/public", private=True)


def test_an_id_without_an_owner_is_ones_own(hub, merged):
    push(merged, "my-merge")
    assert "model.safetensors" in hub.files("user/my-merge")


# -------------------------------------------------------------------------------------- a repository that has something


def test_what_the_hub_has_is_not_sent_again(hub, merged):
    first = push(merged, "push/twice")
    hub.forget_traffic()
    assert push(merged, "push/twice").oid == first.oid, "nothing has changed: no commit"
    assert not hub.bytes_uploaded
    (merged / "generation_config.json").write_text('{"temperature": 0.5}')
    push(merged, "push/twice")
    assert hub.bytes_uploaded == {"push/twice/generation_config.json": 20}
    assert not [request for request in hub.requests if request.startswith("PUT")]


def test_another_merge_replaces_weights_heads_and_tokenizer_but_nothing_else(hub, made, merged, tmp_path):
    for name in ("heads", "sharded"):
        folder = shutil.copytree(made / name, tmp_path / name)
        (folder / "spiece.model").write_text("of another tokenizer")
        push(folder, "push/replaced")
        HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="docs/note.txt", repo_id="push/replaced")
    push(merged, "push/replaced")
    pushed = hub.files("push/replaced")
    assert weights(pushed) == weights(files_of(merged))
    assert set(pushed) == {*files_of(merged), ".gitattributes", "docs/note.txt"}
    assert torch.equal(logits(load("push/replaced")), logits(load(merged)))


def test_a_branch_is_made_and_the_main_one_stays(hub, made, merged, tmp_path):
    main = push(merged, "push/branches")
    commit = push(shutil.copytree(made / "sharded", tmp_path / "sharded"), "push/branches", revision="next")
    branches = hub.repos["push/branches"].branches
    assert branches == {"main": main.oid, "next": commit.oid}
    assert torch.equal(logits(load("push/branches", revision="next")), logits(load(made / "sharded")))
    push(merged, "push/new-and-branch", revision="next")
    assert "model.safetensors" not in hub.files("push/new-and-branch")


def test_a_pull_request_shows_nothing_on_the_branch(hub, made, merged, tmp_path):
    main = push(merged, "push/request")
    commit = push(shutil.copytree(made / "sharded", tmp_path / "sharded"), "push/request", create_pr=True)
    assert commit.pr_url == f"{hub.url}/push/request/discussions/1"
    assert hub.repos["push/request"].resolve("main") == main.oid
    assert torch.equal(logits(load("push/request", revision="refs/pr/1")), logits(load(made / "sharded")))
    (merged / "generation_config.json").unlink()
    push(merged, "push/request", revision="refs/pr/1")
    assert "generation_config.json" not in hub.files("push/request", "refs/pr/1")
    assert "generation_config.json" in hub.files("push/request")


# ------------------------------------------------------------------------------------------------------------ the card


def test_what_was_written_into_the_card_on_the_website_stays(hub, merged):
    push(merged, "push/edited")
    edited = card_of("push/edited") + "\n## Notes\n\nWritten on the website.\n"
    HfApi().upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id="push/edited")
    push(merged, "push/edited")
    assert "Written on the website." in card_of("push/edited")
    assert (merged / "README.md").read_text() == card_of("push/edited")
    assert not (merged / "README.before-push.md").exists()


def test_what_was_written_into_the_folders_card_is_published_or_kept(hub, merged):
    push(merged, "push/written")
    card = merged / "README.md"
    card.write_text(card.read_text() + "\nWritten here.\n")
    push(merged, "push/written")
    assert "Written here." in card_of("push/written")
    edited = card_of("push/written").replace("Written here.", "Written on the website.")
    HfApi().upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id="push/written")
    push(merged, "push/written")
    assert "Written here." not in card_of("push/written")
    assert "Written on the website." in card_of("push/written")
    assert "Written here." in (merged / "README.before-push.md").read_text()
    assert "README.before-push.md" not in hub.files("push/written")
    card.write_text(card.read_text().replace("Written on the website.", "Written here later."))
    push(merged, "push/written")
    assert "Written here." in (merged / "README.before-push.md").read_text()
    assert "Written here later." in (merged / "README.before-push-2.md").read_text()


def test_metadata_that_the_hub_refuses_are_refused_before_anything_is_made(hub, merged):
    for line, reason in (("license: my-own", '"license" must be one of'), ("base_model: 7", '"base_model" must be')):
        (merged / "README.md").write_text(f"---\n{line}\n---\n# Mine\n")
        with pytest.raises(MergeError, match=rf"README\.md are refused: .*{reason}.*Nothing was published"):
            push(merged, "push/refused")
    assert "push/refused" not in hub.repos
    (merged / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    push(merged, "push/refused")
    assert "# Mine" in card_of("push/refused")


# ----------------------------------------------------------------------------------------------------- what is no merge


@pytest.mark.parametrize("name", ["recipe.yaml", "merge_report.json", "config.json", "model.safetensors"])
def test_a_folder_that_is_no_complete_merge_is_refused_offline(hub, merged, name):
    (merged / name).unlink()
    with pytest.raises(MergeError, match=rf"is not a .*merge.*: it has no {name}"):
        push(merged, "push/incomplete")
    assert hub.requests == []


def test_a_damaged_weight_file_is_refused_offline(hub, made, merged, tmp_path):
    (merged / "model.safetensors").write_bytes((merged / "model.safetensors").read_bytes()[:-100])
    sharded = shutil.copytree(made / "sharded", tmp_path / "sharded")
    next(sharded.glob("model-00001*")).unlink()
    linked = shutil.copytree(made / "merged", tmp_path / "linked")
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(made / "merged" / "model.safetensors")
    for folder, reason in (
        (merged, "truncated"),
        (sharded, "is missing"),
        (linked, "is a link"),
        (made / "x", "folder"),
    ):
        with pytest.raises(MergeError, match=reason):
            push(folder, "push/damaged")
    assert hub.requests == []


@pytest.mark.parametrize("repo_id", ["", "a/b/c", "https://huggingface.co/me/merged", "me/bad name", "-me/merged"])
def test_what_is_no_id_of_a_repository_is_refused_offline(hub, merged, repo_id):
    with pytest.raises(MergeError, match=r"is no id of a repository on the Hub, such as 'owner/name'"):
        push(merged, repo_id)
    assert hub.requests == []


# ---------------------------------------------------------------------------------------------------- the command line


def test_the_command_line_pushes_and_prints_the_address(hub, merged):
    options = ["--private", "--commit-message", "First merge", "--token", "hf_mine"]
    done = CliRunner().invoke(app, ["push", str(merged), "push/command", *options])
    assert done.exit_code == 0, done.output
    sha = hub.repos["push/command"].resolve("main")
    assert done.stdout.strip() == f"{hub.url}/push/command/commit/{sha}"
    done = CliRunner().invoke(app, ["push", str(merged), "push/command", "--revision", "draft"])
    assert done.exit_code == 0, done.output
    (merged / "generation_config.json").unlink()
    done = CliRunner().invoke(app, ["push", str(merged), "push/command", "--create-pr"])
    assert done.stdout.strip() == f"{hub.url}/push/command/discussions/1"


@pytest.mark.parametrize("repo_id", ["me/not-logged-in", "not-logged-in"])
def test_a_push_without_a_login_says_how_to_log_in(hub, merged, monkeypatch, tmp_path, repo_id):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(MergeError, match=r"ou are not logged in|there is none.*hf auth login") as caught:
        push(merged, repo_id)
    assert "hf auth login" in str(caught.value)
    assert "To resume:" in str(caught.value)


def test_results_of_benchmarks_reach_the_benchmarks(hub, merged):
    path = ".eval_results/neuromerge.yaml"
    push(merged, "me/merged")
    assert path not in HfApi().list_repo_files("me/merged")
    known = {"dataset": "org/sums", "benchmark_task": "small"}
    add_results(
        merged,
        [
            Result("merged", "sums", "accuracy", 0.5, **known),
            Result("base", "sums", "accuracy", 0.4, **known),
            Result("merged", "words", "accuracy", 0.6, dataset="org/words"),
        ],
    )
    push(merged, "me/merged")
    with open(hf_hub_download("me/merged", path), encoding="utf-8") as file:
        assert yaml.safe_load(file) == [{"dataset": {"id": "org/sums", "task_id": "small"}, "value": 0.5}]
    report = load_report(merged)
    dataclasses.replace(report, results=[]).save(merged)
    push(merged, "me/merged")
    assert path not in HfApi().list_repo_files("me/merged")
