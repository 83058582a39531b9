"""PCB-Merging ranks scores by their bits, so a score of minus zero must count as 0."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from neuromerge_hf import PCBConfig, merge
from neuromerge_hf.methods.pcb import Balance, score
from tiny_models import save_fine_tune, save_llama


def test_a_score_of_minus_zero_is_zero() -> None:
    task_vector, total = torch.tensor([1e-30, -1e-30, 0.0]), torch.tensor([-1e-30, 1e-30, -1.0])
    found = score(task_vector, total, Balance(0.0, 1.0), 2)
    assert found.tolist() == [0, 0, 0]
    assert not found.signbit().any()


def test_experts_with_tiny_opposite_changes_are_merged(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    experts = [save_fine_tune(base, tmp_path / f"expert-{seed}", seed=seed) for seed in (1, 2)]
    for expert, sign in zip(experts, (1, -2), strict=True):
        weights = load_file(base / "model.safetensors")
        changed = {name: torch.zeros_like(weight).add_(sign * 1e-25) for name, weight in weights.items()}
        save_file(changed, expert / "model.safetensors", metadata={"format": "pt"})
    zeros = {name: torch.zeros_like(weight) for name, weight in load_file(base / "model.safetensors").items()}
    save_file(zeros, base / "model.safetensors", metadata={"format": "pt"})
    merge(experts, tmp_path / "merged", base_model=base, config=PCBConfig(density=1))
    assert all(weight.isfinite().all() for weight in load_file(tmp_path / "merged" / "model.safetensors").values())
