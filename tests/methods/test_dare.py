"""DARE beside PEFT's functions, with the same entries dropped."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft.utils import merge_utils
from safetensors.torch import load_file
from torch import Tensor

from neuromerge_hf import DARETIESConfig, merge
from neuromerge_hf.methods.dare import dropped
from tiny_models import save_fine_tune, save_llama

DROP_RATE, SEED, EXPERTS = 0.6, 3, 3
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and three fine-tunes of it."""
    folder = tmp_path_factory.mktemp("dare")
    base = save_llama(folder / "base")
    return [base, *(save_fine_tune(base, folder / f"full-{seed}", seed=seed) for seed in range(EXPERTS))]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The masks that PEFT draws instead of random ones, in their order."""
    masks: list[Tensor] = []
    monkeypatch.setattr(torch, "bernoulli", lambda input: masks.pop(0).view(input.shape))
    return masks


def parameters(models: list[Path]) -> Iterator[tuple[str, Tensor, list[Tensor], list[Tensor]]]:
    """The name of each parameter, the base's values, the task vectors, and the masks of the entries that are kept."""
    base, *experts = (load_file(model / WEIGHTS) for model in models)
    for name, theta in base.items():
        masks = [~dropped(SEED, expert, name, 0, theta.numel(), DROP_RATE) for expert in range(len(experts))]
        yield name, theta, [expert[name] - theta for expert in experts], [mask.float() for mask in masks]


def test_without_trimming_it_is_pefts_dare_ties(models: list[Path], tmp_path: Path, drawn: list[Tensor]) -> None:
    base, *experts = models
    config = DARETIESConfig(drop_rate=DROP_RATE, density=1, seed=SEED)
    merge(experts, tmp_path / "merged", base_model=base, config=config, device="cpu")
    merged = load_file(tmp_path / "merged" / WEIGHTS)
    for name, theta, task_vectors, masks in parameters(models):
        drawn += masks
        change = merge_utils.dare_ties(task_vectors, torch.ones(EXPERTS), 1 - DROP_RATE)
        torch.testing.assert_close(merged[name], theta + change, rtol=1e-6, atol=1e-6, msg=name)
    assert not drawn


def test_one_expert_is_dropped_and_rescaled_as_in_pefts_dare_linear(models, tmp_path, drawn) -> None:
    config = DARETIESConfig(drop_rate=DROP_RATE, density=1, seed=SEED)
    merge([models[1]], tmp_path / "merged", base_model=models[0], config=config, device="cpu")
    merged = load_file(tmp_path / "merged" / WEIGHTS)
    for name, theta, task_vectors, masks in parameters(models[:2]):
        drawn += masks
        change = merge_utils.dare_linear(task_vectors, torch.ones(1), 1 - DROP_RATE)
        torch.testing.assert_close(change, task_vectors[0] * masks[0].view(theta.shape) / (1 - DROP_RATE))
        torch.testing.assert_close(merged[name], theta + change, rtol=1e-6, atol=1e-6, msg=name)
