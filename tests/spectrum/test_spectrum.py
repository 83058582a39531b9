"""Flattened and decorrelated matrices, against float64 SVDs written out directly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference_methods
from neuromerge_hf.spectrum import Factors, decorrelated, singular_triples, spectral_norm, with_spectrum

SHAPES = ((1, 1), (1, 7), (30, 30), (50, 20), (20, 50), (200, 64))
modest = settings(deadline=None, max_examples=40, derandomize=True)


def decaying(rows: int, columns: int, *, smallest: float, seed: int = 0) -> Tensor:
    """A matrix with singular values from 1 down to `smallest`."""
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(rows, min(rows, columns), dtype=torch.float64, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(columns, min(rows, columns), dtype=torch.float64, generator=generator))
    values = torch.logspace(0, torch.tensor(smallest).log10().item(), min(rows, columns), dtype=torch.float64)
    return (u * values @ v.T).float()


def low_rank(rows: int, columns: int, rank: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return Factors(left / 30, right / 30)


def product(factors: Factors) -> Tensor:
    return factors.left.double() @ factors.right.double()


def flattened(matrix: Tensor | Factors) -> tuple[Factors, Tensor]:
    """The matrix with ones for its singular values, and these values."""
    found = [torch.zeros(0, dtype=torch.float64)]
    directions = with_spectrum(matrix, lambda s: found.append(s) or torch.ones_like(s))  # type: ignore[func-returns-value]
    return directions, found[-1]


def error(got: Factors, want: Tensor) -> float:
    return ((product(got) - want).norm() / want.norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("smallest", [0.5, 2e-3, 1e-7])
def test_singular_values_above_a_thousandth_of_the_largest_become_one(shape: tuple[int, int], smallest: float) -> None:
    matrix = decaying(*shape, smallest=smallest)
    want, values = reference_methods.flattened(matrix.double())
    directions, found = flattened(matrix)
    assert error(directions, want) < 1e-4
    torch.testing.assert_close(found, values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rule_sees_the_singular_values_and_replaces_them(shape: tuple[int, int]) -> None:
    matrix = decaying(*shape, smallest=1e-2)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert error(with_spectrum(matrix, lambda s: 3 * s.sqrt()), u @ torch.diag(3 * s.sqrt()) @ vh) < 1e-4
    assert error(with_spectrum(matrix, lambda s: s), matrix.double()) < 1e-5


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4))
@modest
def test_factors_give_what_their_product_gives(rows: int, columns: int, ranks: list[int]) -> None:
    tasks = [low_rank(rows, columns, rank, seed) for seed, rank in enumerate(ranks)]
    want, values = reference_methods.flattened(sum(map(product, tasks), torch.zeros(rows, columns)))
    stacked = Factors(torch.cat([task.left for task in tasks], 1), torch.cat([task.right for task in tasks]))
    if not 1e-4 < (values.min() / values.max()).item() < 1.1e-3:  # else rounding may choose another rank
        assert error(flattened(stacked)[0], want) < 1e-4
    want = reference_methods.decorrelated([product(task) for task in tasks], len(tasks))
    assert error(decorrelated(tasks, len(tasks)), want) < 1e-3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_the_singular_vectors_of_tasks_become_orthonormal(shape: tuple[int, int], tasks: int) -> None:
    matrices = [decaying(*shape, smallest=1e-2, seed=seed) for seed in range(tasks)]
    want = reference_methods.decorrelated([matrix.double() for matrix in matrices], tasks)
    assert error(decorrelated(matrices, tasks), want) < 1e-4


def test_one_task_alone_is_given_back_by_its_triples() -> None:
    matrix = decaying(40, 25, smallest=1e-3)
    assert error(decorrelated([matrix], 1), matrix.double()) < 1e-6


def test_equal_tasks_are_given_back_within_the_rank_that_each_may_use() -> None:
    task = low_rank(40, 30, 8, seed=1)
    assert error(decorrelated([task] * 3, 3), product(task)) < 1e-6


def test_a_flat_spectrum_stays_as_it_is_and_nothing_beyond_the_rank_is_invented() -> None:
    task = low_rank(60, 50, 5, seed=2)
    once, values = flattened(task)
    assert len(values) == 5
    again, ones = flattened(once)
    torch.testing.assert_close(ones, torch.ones(5, dtype=torch.float64), rtol=1e-6, atol=0)
    assert error(again, product(once)) < 1e-6
    singular = torch.linalg.svdvals(product(flattened(product(task).float())[0]))
    assert (singular > 0.5).sum() == 5


@pytest.mark.parametrize("matrix", [torch.zeros(6, 4), Factors(torch.zeros(6, 2), torch.ones(2, 4))])
def test_no_change_stays_none(matrix: Tensor | Factors) -> None:
    directions, values = flattened(matrix)
    assert len(values) == 0
    assert not product(directions).any()
    assert not product(decorrelated([matrix, matrix], 2)).any()
    assert len(singular_triples(matrix).s) == 0


@pytest.mark.parametrize("shape", [*SHAPES, (600, 400)])
@pytest.mark.parametrize("smallest", [0.9, 1e-3])
def test_the_spectral_norm_is_the_largest_singular_value(shape: tuple[int, int], smallest: float) -> None:
    matrix = decaying(*shape, smallest=smallest, seed=3)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for each, tolerance in ((matrix, 1e-5), (noise, 1e-3)):  # noise has hardly a gap behind its largest value
        want = torch.linalg.svdvals(each.double())[0].item()
        assert spectral_norm(each) == pytest.approx(want, rel=tolerance)


def test_the_spectral_norm_of_factors_is_that_of_their_product() -> None:
    task = low_rank(60, 50, 5, seed=2)
    for each in (task, product(task).float()):
        assert spectral_norm(each) == pytest.approx(torch.linalg.matrix_norm(product(task), 2).item(), rel=1e-6)
    assert spectral_norm(Factors(torch.zeros(4, 2), torch.ones(2, 3))) == spectral_norm(torch.zeros(4, 3)) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_transposed_matrix_gives_the_transposed_result(shape: tuple[int, int]) -> None:
    matrix = decaying(*shape, smallest=1e-2)
    assert error(flattened(matrix.T)[0], product(flattened(matrix)[0]).T) < 1e-5
