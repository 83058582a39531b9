"""The models that the tests of this folder train and merge."""

from pathlib import Path

import pytest

from tiny_models import save_bert, save_fine_tune


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and another expert of it."""
    folder = tmp_path_factory.mktemp("models")
    base = save_bert(folder / "base")
    return base, save_fine_tune(base, folder / "other", seed=1)
