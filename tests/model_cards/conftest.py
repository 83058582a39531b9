"""A merge with a card, made once."""

import shutil
from pathlib import Path

import pytest

from cards import save_card
from neuromerge_hf import merge
from tiny_models import save_adapter, save_bert, save_fine_tune


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = save_bert(folder / "base")
    save_fine_tune(base, folder / "math", seed=1, model_class="BertForSequenceClassification", num_labels=3)
    save_adapter(base, folder / "code", seed=2)
    save_card(base, license="apache-2.0", language="en", datasets=["org/words"])
    save_card(folder / "math", license="apache-2.0", language=["en", "pt"], datasets=["org/sums"])
    save_card(folder / "code", license="apache-2.0", pipeline_tag="text-generation")
    return folder


@pytest.fixture(scope="module")
def finished(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "merged"
    merge([models / "math", models / "code"], folder, base_model=models / "base")
    return folder


@pytest.fixture
def merged(finished: Path, tmp_path: Path) -> Path:
    """A copy of the merge, which the test may change."""
    return shutil.copytree(finished, tmp_path / "merged")
