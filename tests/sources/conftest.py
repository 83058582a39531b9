"""Bases, fine-tunes and adapters of every family. Each is made once, when it is first used."""

from collections.abc import Callable
from pathlib import Path

import pytest

from families import Relatives
from stored_forms import FAMILIES
from tiny_models import save_fine_tune, save_llama


@pytest.fixture(scope="session")
def relatives_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Relatives]:
    """The models of a family. They are shared: tests that change one take a copy."""
    made: dict[str, Relatives] = {}

    def relatives_of(name: str) -> Relatives:
        return made.setdefault(name, Relatives(name, tmp_path_factory.mktemp(name), FAMILIES))

    return relatives_of


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama of one layer with biases, the same with tied embeddings, and models of other families."""
    root = tmp_path_factory.mktemp("bases")
    found = {name: Relatives(name, root / name).base for name in ("gpt2", "mixtral", "gpt-oss")}
    for name, tied in (("llama", False), ("tied", True)):
        plain = save_llama(
            root / f"plain-{name}", num_hidden_layers=1, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied
        )
        found[name] = save_fine_tune(plain, root / name, seed=1)
    return found
