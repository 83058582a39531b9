"""The loopback Hub answers the real client, so what passes against it means something."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import save_file
from transformers import AutoModel, BertConfig, BertModel

api = HfApi()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [merge]\n---\n# hello\n")
    (tmp_path / "sub" / "notes.txt").write_text("notes")
    save_file({"weight": torch.arange(60_000.0).reshape(300, 200)}, tmp_path / "model.safetensors")
    return tmp_path


def tiny_bert():
    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    return BertModel(config)


def test_snapshot_download_returns_the_folder_that_was_added(hub, folder):
    commit = hub.add_folder("org/snapshot", folder)
    local = snapshot_download("org/snapshot")
    assert local.endswith(commit)
    assert api.list_repo_files("org/snapshot") == ["README.md", "model.safetensors", "sub/notes.txt"]
    for name in hub.files("org/snapshot"):
        assert Path(local, name).read_bytes() == (folder / name).read_bytes()


def test_model_info_gives_commit_card_and_sizes(hub, folder):
    commit = hub.add_folder("org/info", folder)
    info = api.model_info("org/info", files_metadata=True)
    assert info.sha == commit
    assert info.card_data.license == "mit"
    weights = next(s for s in info.siblings if s.rfilename == "model.safetensors")
    assert weights.size == weights.lfs.size == (folder / "model.safetensors").stat().st_size


def test_safetensors_metadata_is_read_by_range(hub, folder):
    hub.add_folder("org/ranges", folder)
    metadata = api.get_safetensors_metadata("org/ranges")
    assert metadata.files_metadata["model.safetensors"].tensors["weight"].shape == [300, 200]
    assert hub.bytes_served["org/ranges/model.safetensors"] < 110_000 < (folder / "model.safetensors").stat().st_size


def test_branches_tags_and_commits_are_revisions(hub, folder):
    first = hub.add_folder("org/revisions", folder)
    (folder / "sub" / "notes.txt").write_text("newer")
    api.create_tag("org/revisions", tag="v1")
    api.create_branch("org/revisions", branch="draft")
    second = hub.add_folder("org/revisions", folder, revision="draft")
    for revision, text in {"main": "notes", "v1": "notes", first: "notes", "draft": "newer", second: "newer"}.items():
        assert Path(hf_hub_download("org/revisions", "sub/notes.txt", revision=revision)).read_text() == text
    assert [b.name for b in api.list_repo_refs("org/revisions").branches] == ["main", "draft"]


@pytest.mark.parametrize(
    ("repo_id", "path", "revision", "error"),
    [
        ("org/missing", "README.md", None, RepositoryNotFoundError),
        ("org/errors", "README.md", "missing", RevisionNotFoundError),
        ("org/errors", "missing.json", None, RemoteEntryNotFoundError),
        ("org/gated", "README.md", None, GatedRepoError),
    ],
)
@pytest.mark.parametrize("token", [None, False])
def test_what_is_missing_raises_the_clients_own_error(hub, folder, repo_id, path, revision, error, token):
    hub.add_folder("org/errors", folder)
    hub.add_folder("org/gated", folder, gated=True)
    with pytest.raises(error) as caught:
        hf_hub_download(repo_id, path, revision=revision, token=token)
    # What the client raises when it could not connect would pass for a missing file.
    assert not isinstance(caught.value, LocalEntryNotFoundError)


def test_push_to_hub_and_from_pretrained_round_trip(hub):
    model = tiny_bert()
    model.push_to_hub("org/pushed")
    again = AutoModel.from_pretrained("org/pushed")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))

    model.push_to_hub("org/pushed", revision="next", max_shard_size="1KB")
    assert "model.safetensors.index.json" in hub.files("org/pushed", "next")
    assert "model.safetensors.index.json" not in hub.files("org/pushed")
    AutoModel.from_pretrained("org/pushed", revision="next")

    model.pooler.dense.bias.data += 1  # of files that are the same, the client makes no pull request
    pull_request = model.push_to_hub("org/pushed", create_pr=True)
    assert pull_request.pr_num == 1
    AutoModel.from_pretrained("org/pushed", revision="refs/pr/1")


def test_a_push_without_a_token_is_refused(hub):
    with pytest.raises(HfHubHTTPError, match="401"):
        api.create_repo("org/stranger", token=False)


def test_upload_folder_and_create_commit_change_only_what_they_name(hub, folder):
    api.create_repo("org/upload")
    api.create_repo("org/upload", exist_ok=True)
    commit = api.upload_folder(repo_id="org/upload", folder_path=folder)
    assert api.model_info("org/upload").sha == commit.oid

    def edit():
        operations = [CommitOperationAdd("a.txt", b"a"), CommitOperationDelete("sub/")]
        api.create_commit("org/upload", operations, commit_message="edit", parent_commit=commit.oid)

    edit()
    assert set(hub.files("org/upload")) >= {"README.md", "a.txt", "model.safetensors"}
    assert "sub/notes.txt" not in hub.files("org/upload")
    with pytest.raises(HfHubHTTPError, match="412"):
        edit()  # its parent is no longer the newest commit


def test_large_files_go_by_lfs_and_only_once(hub, folder):
    api.create_repo("org/lfs")
    (folder / "large.png").write_bytes(b"p" * 20_000)
    (folder / "small.png").write_bytes(b"p" * 200)
    api.upload_folder(repo_id="org/lfs", folder_path=folder)
    large = sum((folder / name).stat().st_size for name in ("model.safetensors", "large.png"))
    assert hub.bytes_uploaded["org/lfs"] == large
    assert hub.bytes_uploaded["org/lfs/small.png"] == 200
    assert sum(request.startswith("PUT /lfs/org/lfs/") for request in hub.requests) == 2
    assert "POST /lfs/org/lfs/verify" in hub.requests
    assert {s.rfilename for s in api.model_info("org/lfs", files_metadata=True).siblings if s.lfs} == {
        "model.safetensors",
        "large.png",
    }
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    hub.forget_traffic()
    api.upload_folder(repo_id="org/lfs", folder_path=folder)
    assert not hub.bytes_uploaded["org/lfs"], "the content is stored, under another name"
    stored = hub.files("org/lfs")
    assert stored["model-00001-of-00001.safetensors"] == stored["model.safetensors"]


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ("license: mit\nbase_model: [org/a, org/b]\ntags: [merge]\nbase_model_relation: merge", None),
        ("license: mine", '"license" must be one of'),
        ("base_model: [org/a, 7]", '"base_model" must be a string'),
        ("base_model: /home/me/model", '"base_model" with value "/home/me/model" is not valid'),
        ("base_model_relation: fused", '"base_model_relation" must be one of'),
        ("tags: [merge", "bad YAML"),
    ],
)
def test_metadata_of_cards_are_checked_before_they_are_committed(hub, metadata, error):
    api.create_repo("org/cards", exist_ok=True)
    card = f"---\n{metadata}\n---\n# A card\n".encode()
    if error is None:
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="org/cards")
        return
    with pytest.raises(ValueError, match=rf"Invalid metadata in README\.md\.(.|\n)*{error}"):
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="org/cards")


def test_it_fails_on_demand_as_often_as_asked(hub, folder):
    hub.add_folder("org/failing", folder)
    hub.fail("GET /api/models/org/failing", 403, "Not today.", times=2)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match=r"403 Forbidden: Not today\."):
            api.model_info("org/failing")
    assert api.model_info("org/failing").id == "org/failing"


def test_a_download_that_is_cut_in_the_middle_is_taken_up_again(hub, folder):
    hub.add_folder("org/cut", folder)
    hub.fail("GET /org/cut/resolve/.*/model.safetensors", cut="answer", times=1)
    path = hf_hub_download("org/cut", "model.safetensors")
    assert Path(path).read_bytes() == (folder / "model.safetensors").read_bytes()
    assert sum("GET /org/cut/resolve" in request for request in hub.requests) == 2


def test_a_request_that_is_cut_has_no_effect_and_a_cut_answer_has(hub):
    for cut, made in {"request": False, "answer": True}.items():
        hub.fail("POST /api/repos/create", cut=cut, times=1)
        with pytest.raises(Exception, match=r"disconnected|closed|reset"):
            api.create_repo(f"org/cut-{cut}")
        assert (f"org/cut-{cut}" in hub.repos) == made


def test_a_private_repository_is_hidden_from_strangers(hub):
    api.create_repo("org/private", private=True)
    assert api.model_info("org/private").private
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/private", token=False)


def test_counters_tell_what_a_download_cost(hub, folder):
    hub.add_folder("org/counted", folder)
    hf_hub_download("org/counted", "model.safetensors")
    size = (folder / "model.safetensors").stat().st_size
    assert hub.bytes_served == {"org/counted/model.safetensors": size}
    hf_hub_download("org/counted", "model.safetensors")
    assert hub.bytes_served.total() == size, "the second call is answered from the cache"
    assert "HEAD /org/counted/resolve/main/model.safetensors" in hub.requests
