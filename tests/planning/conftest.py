"""Models to plan with, made once."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from changes import change_tensors
from loopback_hub import LoopbackHub
from neuromerge_hf import MergeError, merge, plan_merge
from tiny_models import save_adapter, save_bert, save_fine_tune, save_llama


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, fine-tunes and adapters of it. Tests that damage one take a copy."""
    root = tmp_path_factory.mktemp("models")
    base = save_llama(root / "base")
    save_fine_tune(base, root / "math", seed=1)
    save_fine_tune(base, root / "sharded", seed=2, shard="20KB")
    save_adapter(base, root / "code", seed=3)
    bert = save_bert(root / "bert")
    save_fine_tune(bert, root / "topics", seed=4, model_class="BertForSequenceClassification", num_labels=3)
    return root


@pytest.fixture
def copied(models: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that copies a model, which the test may damage."""

    def copy(name: str, to: str | None = None) -> Path:
        return Path(shutil.copytree(models / name, tmp_path / (to or name)))

    return copy


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """An empty folder."""
    (tmp_path / "workspace").mkdir()
    return tmp_path / "workspace"


@pytest.fixture
def refused(workspace: Path) -> Callable[..., str]:
    """A function that merges, expects a `MergeError`, checks that no files are left, and returns the message."""

    def refuse(experts: Any, *, planned: bool = True, **kwargs: Any) -> str:
        with pytest.raises(MergeError) as caught:
            merge(experts, workspace / "made" / "merged", **kwargs)
        assert list(workspace.iterdir()) == []
        if planned:  # the metadata alone must give the same error
            with pytest.raises(MergeError) as expected:
                plan_merge(experts, **{key: value for key, value in kwargs.items() if key != "overwrite"})
            assert str(expected.value) == str(caught.value)
        return str(caught.value)

    return refuse


@pytest.fixture
def publish(hub: LoopbackHub, models: Path) -> Callable[..., list[str]]:
    """A function that puts models on the Hub under a namespace."""

    def add(namespace: str, *names: str) -> list[str]:
        for name in names:
            hub.add_folder(f"{namespace}/{name}", models / name)
        hub.forget_traffic()
        return [f"{namespace}/{name}" for name in names]

    return add


@pytest.fixture
def changed(models: Path, tmp_path: Path) -> Callable[[str, Callable[[dict[str, Tensor]], object]], Path]:
    """A function that copies a model and changes its tensors."""

    def change(name: str, edit: Callable[[dict[str, Tensor]], object]) -> Path:
        folder = shutil.copytree(models / name, tmp_path / "changed" / name)
        change_tensors(next(folder.glob("*.safetensors")), edit)
        return folder

    return change
