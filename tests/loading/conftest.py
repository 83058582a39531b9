"""Merges that `AutoMergedModel` loads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neuromerge_hf import AutoMergedModel
from tiny_models import save_classifiers, save_llamas


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifiers(save_llamas(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def load_merged(models: Path, cache: Path) -> Callable[..., Any]:
    """Loads a merge of two experts; of two classifiers if a head is asked for."""

    def from_pretrained(**arguments: Any) -> Any:
        names, base = (["math", "code"], "base") if "head" not in arguments else (["topics", "moods"], "encoder")
        experts = [models / name for name in names]
        return AutoMergedModel.from_pretrained(experts, base_model=models / base, merge_cache_dir=cache, **arguments)

    return from_pretrained


@pytest.fixture
def model(load_merged: Callable[..., Any]) -> Any:
    return load_merged()
