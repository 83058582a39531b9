"""Merging LoRA factors without forming their products, against the direct SVD form on the formed products.

Agreement is that of `test_kernel`: within 1e-5 of the neuron's change plus one float32 rounding, for 99.9% of neurons.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import reference
from neuromerge_hf import MergeError, plan_merge
from neuromerge_hf.engine.block_statistics import BlockStatistics, sum_neurons
from neuromerge_hf.engine.blocks import Memory, load_block
from neuromerge_hf.kernel import merge_low_rank, merge_neurons
from neuromerge_hf.storage.layout import Block
from tiny_models import save_adapter, save_llama

NEURONS = 300
RANK = 4
EPSILON = torch.finfo(torch.float32).eps
LAMBDAS = ((0.0, 1.5), (0.4, 1.0))


def factors_of(tasks: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Base (neurons, n), left (neurons, T, r) and right (T, r, n), as trained adapters have them."""
    generator = torch.Generator().manual_seed(tasks * n)
    base = 0.02 * torch.randn(NEURONS, n, generator=generator)
    left = 1e-3 * torch.randn(NEURONS, tasks, RANK, generator=generator)
    right = torch.randn(tasks, RANK, n, generator=generator)
    return base, left, right


def overlap_of(right: Tensor) -> Tensor:
    rows = right.double().flatten(0, 1)
    return (rows @ rows.T).view(*right.shape[:2], *right.shape[:2])


def merged(base: Tensor, left: Tensor, right: Tensor, lambdas: tuple[float, float]) -> Tensor:
    return merge_low_rank(base, left, right, overlap_of(right), *lambdas)


def share_that_agrees(got: Tensor, base: Tensor, left: Tensor, right: Tensor, lambdas: tuple[float, float]) -> float:
    formed = torch.einsum("ktr,trn->ktn", left.double(), right.double())
    want = torch.stack([reference.merge_neuron(w, tau, *lambdas) for w, tau in zip(base, formed, strict=True)])
    allowed = 1e-5 * (want - base).norm(dim=1) + EPSILON * want.norm(dim=1)
    return ((got - want).norm(dim=1) <= allowed).double().mean().item()


@pytest.mark.parametrize("lambdas", LAMBDAS)
@pytest.mark.parametrize("n", [16, 129, 1024])
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_factors_merge_as_their_products_do(tasks: int, n: int, lambdas: tuple[float, float]) -> None:
    base, left, right = factors_of(tasks, n)
    assert share_that_agrees(merged(base, left, right, lambdas), base, left, right, lambdas) >= 0.999


@pytest.mark.parametrize("lambdas", LAMBDAS)
def test_absent_tasks_zero_weights_and_parallel_changes_merge_as_their_products_do(
    lambdas: tuple[float, float],
) -> None:
    base, left, right = factors_of(3, 64)
    base[:20] = 0
    left[10:60, 1] = 0
    # Neurons 100.. of task 0 change along their own weights: every third exactly, the others nearly.
    right[0, 0] = base[100]
    base[101:130] = base[100]
    left[100:130, 0] = 0
    left[100:130, 0, 0] = 0.05
    left[100:130:3, 0, 1] = 1e-6
    assert share_that_agrees(merged(base, left, right, lambdas), base, left, right, lambdas) >= 0.999


@pytest.mark.parametrize("along_base", [False, True])
def test_each_neuron_votes_once_however_it_is_merged(along_base: bool) -> None:
    base, left, right = factors_of(3, 64)
    if along_base:  # then some are merged from their task vectors
        right[0, 0] = base[100]
        base[101:130] = base[100]
        left[100:130, 0, 0] = 0.5
    found: list[BlockStatistics] = []
    merge_low_rank(
        base, left, right, overlap_of(right), *LAMBDAS[1], lambda election: found.append(sum_neurons(election))
    )
    want: list[BlockStatistics] = []
    x = torch.cat([base.unsqueeze(1), torch.einsum("ktr,trn->ktn", left, right)], dim=1)
    merge_neurons(x, *LAMBDAS[1], lambda election: want.append(sum_neurons(election)))
    assert len(found) == 1 + along_base
    for name, value in vars(want[0]).items():
        torch.testing.assert_close(sum(getattr(sums, name) for sums in found), value, rtol=1e-5, atol=1e-9)


def test_a_neuron_that_no_adapter_changes_comes_back_bit_for_bit() -> None:
    base, left, right = factors_of(2, 32)
    base[5] = -0.0
    left[5:9] = 0
    got = merged(base, left, right, (0.3, 1.2))
    assert torch.equal(got[5:9].view(torch.int32), base[5:9].view(torch.int32))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    base, left, right = factors_of(2, 32)
    base[7, 3] = value
    with pytest.raises(FloatingPointError):
        merged(base, left, right, (0.0, 1.0))


def test_planning_opens_no_adapter(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", seed=1)
    (expert,) = plan_merge([adapter], base_model=base).experts
    factors = [factor for vector in expert.task_vectors.values() for factor in (vector.a, vector.b)]
    assert len(factors) == 28
    assert not any("descriptor" in vars(factor.file) for factor in factors)  # its file is opened at the first read


def test_factors_are_read_once_for_all_blocks_of_a_tensor(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", seed=1)
    plan = plan_merge([adapter], base_model=base)
    unit = next(unit for unit in plan.units if unit.parameter == "model.layers.0.mlp.up_proj.weight")
    opened = unit.opened()
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    whole = load_block(opened, Block(0, 0, 48), Memory(), torch.device("cpu"))[1].clone()
    for start in range(0, 48, 16):
        part = load_block(opened, Block(0, start, start + 16), Memory(), torch.device("cpu"))[1]
        assert torch.equal(part, whole[start : start + 16])
    assert opened.bytes_read == unit.bytes_read == 4 * (48 * 32 + 4 * (48 + 32))
    with pytest.raises(MergeError, match="ended early"):
        load_block(unit, Block(0, 0, 48), Memory(), torch.device("cpu"))
