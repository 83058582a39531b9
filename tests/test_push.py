"""A merged folder becomes a repository that plain transformers loads: in one commit, or not at all."""

import shutil
import types

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

from neuromerge_hf import merge
from neuromerge_hf.hub import push
from tiny_models import load, logits, save_adapter, save_fine_tune, save_llama

api = HfApi()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    base = save_llama(root / "base")
    save_fine_tune(base, root / "math", seed=1)
    save_adapter(base, root / "code", seed=2)
    return root


@pytest.fixture(scope="module")
def made(models, tmp_path_factory):
    return merge([models / "math", models / "code"], tmp_path_factory.mktemp("made") / "merged").output_dir


@pytest.fixture
def merged(made, tmp_path):
    return shutil.copytree(made, tmp_path / "my merged")


@pytest.fixture
def impatient(monkeypatch):
    """The client asks again and again, for half a minute. Here it does so at once."""
    clock = types.SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)


def commits(hub, repo_id: str) -> list[str]:
    return [request for request in hub.requests if request.startswith(f"POST /api/models/{repo_id}/commit/")]


# ------------------------------------------------------------------------------------------------------ what is pushed


def test_a_pushed_merge_is_loaded_by_plain_transformers(hub, merged):
    commit = push(merged, "push/plain")
    assert torch.equal(logits(load("push/plain")), logits(load(merged)))
    assert commit.oid == hub.repos["push/plain"].resolve("main")
    assert len(commits(hub, "push/plain")) == 1
    assert {".gitattributes", "recipe.yaml", "merge_report.json", "README.md", "tokenizer.json"} <= set(
        hub.files("push/plain")
    )
    ModelCard.load("push/plain").validate()
