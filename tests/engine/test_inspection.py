"""What an inspection measures without a merge, against singular values and sums that are taken slowly."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from neuromerge_hf import MergeError, NeuroMergingConfig, inspect_models, merge, plan_merge
from neuromerge_hf.engine.inspection import NEURONS, inspect_units
from neuromerge_hf.engine.passes import Passes
from neuromerge_hf.spectrum import effective_rank, make_probes
from tiny_models import save_fine_tune, save_llamas

CPU: dict[str, Any] = {"device": "cpu", "threads": 1}
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = save_llamas(tmp_path_factory.mktemp("models"))
    save_fine_tune(root / "base", root / "chat", seed=3)
    return root


def changes(models: Path, name: str) -> dict[str, Tensor]:
    base, expert = (load_file(models / each / WEIGHTS) for each in ("base", name))
    return {key: (expert[key] - base[key]).double() for key in base}


def participation(matrix: Tensor) -> float:
    energy = torch.linalg.svdvals(matrix.double()).square()
    return float(energy.sum() ** 2 / energy.square().sum())


# The estimate


@pytest.mark.parametrize("rank", [1, 2, 7, 16])
def test_the_effective_rank_of_a_matrix_of_low_rank_is_exact(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    matrix = torch.randn(90, rank, generator=generator) @ torch.randn(rank, 60, generator=generator)
    probes = make_probes(60, torch.device("cpu"))
    found = effective_rank(float(matrix.double().square().sum()), probes, matrix.T @ (matrix @ probes))
    assert found == pytest.approx(participation(matrix), rel=1e-3)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0])
def test_the_effective_rank_of_any_matrix_is_estimated(decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, 200, generator=generator))[0] for size in (400, 300))
    matrix = (u * torch.arange(1, 201) ** -decay) @ v.T
    probes = make_probes(300, torch.device("cpu"))
    found = effective_rank(float(matrix.double().square().sum()), probes, matrix.T @ (matrix @ probes))
    assert found == pytest.approx(participation(matrix), rel=0.25)


def test_nothing_has_no_rank() -> None:
    probes = make_probes(8, torch.device("cpu"))
    assert effective_rank(0.0, probes, torch.zeros(8, probes.shape[1])) is None


# The pass


def test_parameters_are_measured_as_by_singular_values(models: Path) -> None:
    found = inspect_models([models / "math", models / "chat"], base_model=models / "base", **CPU).diagnostics
    taus = [changes(models, name) for name in ("math", "chat")]
    base = load_file(models / "base" / WEIGHTS)
    matrices = {name for name, weight in base.items() if weight.ndim == 2}
    assert {each.name for each in found.parameters} == matrices
    for each in found.parameters:
        one, other = (tau[each.name] for tau in taus)
        cosine = float((one * other).sum() / one.norm() / other.norm())
        assert each.cosines[0][1] == pytest.approx(cosine, abs=1e-5)
        norms = [float(tau.norm() / base[each.name].double().norm()) for tau in (one, other)]
        assert each.relative_norms == pytest.approx(norms, rel=1e-5)
        assert each.effective_ranks == pytest.approx([participation(tau) for tau in (one, other)], rel=0.35)
        assert each.survivals == []
        assert each.name.startswith(each.layer)


def test_a_lora_has_at_most_its_rank(models: Path) -> None:
    found = inspect_models([models / "code"], base_model=models / "base", **CPU).diagnostics
    ranks = [each.effective_ranks[0] or 0.0 for each in found.parameters]
    assert all(1 <= rank <= 4.01 for rank in ranks)
    assert max(ranks) > 2


def test_the_neurons_that_collide_most_are_named(models: Path) -> None:
    found = inspect_models([models / "math", models / "chat"], base_model=models / "base", **CPU).diagnostics
    base, taus = load_file(models / "base" / WEIGHTS), [changes(models, name) for name in ("math", "chat")]
    excesses = {}
    for name, weight in base.items():
        for neuron, w0 in enumerate(weight.double()) if weight.ndim == 2 else ():
            parts = torch.stack([tau[name][neuron] - (tau[name][neuron] @ w0) / (w0 @ w0 or 1) * w0 for tau in taus])
            u, s, _ = torch.linalg.svd(parts, full_matrices=False)
            energy = s.square()
            differ = u.sign().sum(0) == 0
            excesses[name, neuron] = float(energy[differ].sum() - energy.sum() / 2)
    expected = sorted(excesses, key=lambda key: -excesses[key])[:NEURONS]
    assert [(each.parameter, each.neuron) for each in found.neurons] == expected
    assert all(each.conflicting > each.by_chance == 0.5 for each in found.neurons)
    assert all(0 < each.energy < 1 for each in found.neurons)


def test_a_merge_without_trimming_reports_the_same(models: Path, tmp_path: Path) -> None:
    experts = [models / "math", models / "code"]
    before = inspect_models(experts, base_model=models / "base", **CPU).diagnostics
    merge(experts, tmp_path / "merged", base_model=models / "base", config=NeuroMergingConfig(density=1), **CPU)
    after = inspect_models(tmp_path / "merged").diagnostics
    assert before.cosines == after.cosines
    assert before.verdict == after.verdict
    for one, other in itertools.zip_longest(before.layers, after.layers):
        assert (one.name, one.relative_norms, one.conflicting_orthogonal) == (
            other.name,
            other.relative_norms,
            other.conflicting_orthogonal,
        )
    assert before.layers[0].survivals == []
    assert after.layers[0].survivals[0] is not None


def test_neither_threads_nor_blocks_matter(models: Path) -> None:
    plan = plan_merge([models / "math", models / "chat", models / "code"], base_model=models / "base")
    device = torch.device("cpu")
    want = inspect_units(Passes(plan.work, device))
    for threads, entries in ((1, 150), (3, 1000)):
        assert inspect_units(Passes(plan.work, device, threads, block_entries=entries)) == want


def test_a_nan_is_named(models: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    expert = save_fine_tune(models / "base", tmp_path / "broken", seed=5)
    weights = load_file(expert / WEIGHTS)
    weights["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    save_file(weights, expert / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(MergeError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*NaN"):
        inspect_models([expert], base_model=models / "base", **CPU)
