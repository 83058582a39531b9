"""Families of models with different vocabularies, made once."""

from collections.abc import Callable

import pytest

from vocabularies import Models


@pytest.fixture(scope="session")
def models_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Models]:
    made: dict[str, Models] = {}
    return lambda family: made.setdefault(family, Models(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(scope="session")
def models(models_of: Callable[[str], Models]) -> Models:
    return models_of("llama")
