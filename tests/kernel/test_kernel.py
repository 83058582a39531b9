"""The kernel against the direct SVD form in `reference`, and against the facts that follow from the definitions.

The kernel works on float32 tensors of many neurons at once; the reference on one neuron, in float64, with an SVD.
Two merged neurons agree when they differ by at most 1e-5 of the neuron's change (the norm of the reference's merged
neuron minus w_0) plus one float32 rounding of the neuron itself (2^-23 of its norm), below which a float32 weight
cannot follow. Where eigenvalues nearly coincide both forms jump, so 99.9% of the neurons have to agree, not all.
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from neuromerge_hf.kernel import elect_mean, merge_elementwise, merge_neurons, trim

TASKS = (1, 2, 3, 5, 8)
SIZES = ((1000, 1), (1000, 3), (1000, 5), (200, 65), (20, 4096))  # (neurons, n)
FACT_SIZES = ((200, 3), (50, 257))
DENSITIES = (1.0, 0.2)
LAMBDAS = ((0.0, 1.5), (0.4, 1.0))
WEIGHT, CHANGE = 0.02, 1e-3  # what the entries of w_0 and of a task vector are like
EPSILON = torch.finfo(torch.float32).eps

modest = settings(deadline=None, max_examples=60, derandomize=True)


@cache
def neurons_of(neurons: int, tasks: int, n: int, density: float = 1.0) -> Tensor:
    """Rows w_0, tau_1 .. tau_T of each neuron: experts with something in common, unequal over neurons, trimmed."""
    generator = torch.Generator().manual_seed(neurons * tasks + n)
    x = torch.randn(neurons, 1 + tasks, n, generator=generator)
    x[:, 2:] += 0.5 * x[:, 1:2]
    x[:, 1:] *= torch.randn(neurons, tasks, 1, generator=generator).exp() * CHANGE
    x[:, 0] *= WEIGHT
    for t in range(1, 1 + tasks):
        x[:, t] = torch.where(x[:, t].abs() >= reference.threshold([x[:, t]], density), x[:, t], 0.0)
    return x


def with_zero_base(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], dim=1)


def with_one_task_parallel(x: Tensor) -> Tensor:
    return torch.cat([x[:, :1], 0.03 * x[:, :1], x[:, 2:]], dim=1)


def with_every_task_parallel(x: Tensor) -> Tensor:
    factors = torch.linspace(-0.02, 0.05, x.shape[1] - 1)
    return torch.cat([x[:, :1], factors[:, None] * x[:, :1]], dim=1)


def with_disjoint_supports(x: Tensor) -> Tensor:
    tasks, n = x.shape[1] - 1, x.shape[2]
    owner = torch.arange(n) % tasks
    return torch.cat([x[:, :1], x[:, 1:] * (owner == torch.arange(tasks)[:, None])], dim=1)


def with_disjoint_supports_and_zero_base(x: Tensor) -> Tensor:
    return with_zero_base(with_disjoint_supports(x))


def with_two_groups_of_disjoint_supports_and_zero_base(x: Tensor) -> Tensor:
    member, owner = torch.arange(x.shape[1] - 1) % 2, torch.arange(x.shape[2]) % 2
    return with_zero_base(torch.cat([x[:, :1], x[:, 1:] * (owner == member[:, None])], dim=1))


def with_rows_trimmed_away(x: Tensor) -> Tensor:
    kept = torch.rand(x.shape[0], x.shape[1], 1, generator=torch.Generator().manual_seed(0)) < 0.5
    kept[:, 0] = True
    return torch.where(kept, x, 0.0)


def change(merged: Tensor, x: Tensor) -> Tensor:
    return merged.double() - x[:, 0].double()


def agreement(got: Tensor, want: Tensor, x: Tensor) -> Tensor:
    """Which merged neurons agree, as the module's docstring says."""
    error = (got.double() - want.double()).norm(dim=1)
    return error <= 1e-5 * change(want, x).norm(dim=1) + EPSILON * want.double().norm(dim=1)


def assert_agree(got: Tensor, want: Tensor, x: Tensor) -> None:
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    agree = agreement(got, want, x)
    worst = (~agree).nonzero().flatten().tolist()[:5]
    assert agree.double().mean() >= 0.999, f"{int((~agree).sum())} of {len(agree)} neurons differ, the first: {worst}"


def assert_matches_reference(x: Tensor) -> None:
    psi_par, psi_orth = (
        torch.stack(parts) for parts in zip(*(reference.merge_parts(row[0], row[1:]) for row in x), strict=True)
    )
    for lambda_1, lambda_2 in LAMBDAS:
        want = x[:, 0] + lambda_1 * psi_par + lambda_2 * psi_orth
        assert_agree(merge_neurons(x, lambda_1, lambda_2), want, x)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    differ = got.contiguous().view(torch.int32) != want.contiguous().view(torch.int32)
    assert not differ.any(), f"{int(differ.sum())} of {differ.numel()} entries differ"


# Trim


@modest
@given(st.data())
def test_trim_zeroes_what_is_below_the_threshold_and_keeps_what_equals_it(data: st.DataObject) -> None:
    entries = data.draw(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
    cut = abs(data.draw(st.sampled_from([*entries, 0.0])))
    want = [entry if abs(entry) >= cut else 0.0 for entry in entries]
    assert torch.equal(trim(torch.tensor(entries), cut), torch.tensor(want))


@pytest.mark.parametrize("cut", [0.0, 1.0, 2.0, 3.0])
def test_trim_is_exact_among_denormals(cut: float) -> None:
    smallest = 2.0**-149
    entries = torch.tensor([[0.0, 1.0], [-2.0, 3.0]]) * smallest
    want = torch.where(torch.tensor([[0.0, 1.0], [2.0, 3.0]]) >= cut, entries, 0.0)
    assert_same_bits(trim(entries, cut * smallest).abs(), want.abs())
    assert trim(entries, cut * smallest).dtype == torch.float32


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 1, 4), (0, 3)])
def test_trim_keeps_the_shape(shape: tuple[int, ...]) -> None:
    task_vector = torch.randn(shape)
    assert torch.equal(trim(task_vector, 0.0), task_vector)
    assert torch.equal(trim(task_vector, 1e9), torch.zeros(shape))


def test_trim_at_the_reference_threshold_keeps_n_minus_j() -> None:
    task_vector = torch.linspace(-1, 2, 1000)
    kept = trim(task_vector, reference.threshold([task_vector], 0.2))
    assert kept.count_nonzero() == 1000 - 799 - (task_vector.abs() == 0).sum()


# Elect and average


@modest
@given(st.data())
def test_elect_mean_matches_reference(data: st.DataObject) -> None:
    # Few and small quarters: sums are exact, ties and zeros are common.
    tasks, n = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 6))
    quarter = st.integers(-4, 4).map(lambda value: value / 4)
    columns = data.draw(st.lists(st.lists(quarter, min_size=tasks, max_size=tasks), min_size=n, max_size=n))
    signs = data.draw(st.lists(st.sampled_from([-1, 0, 1]), min_size=n, max_size=n))
    x, tie_sign = torch.tensor(columns), torch.tensor(signs)[:, None]
    without = torch.tensor([reference.elect_mean(column) for column in columns])
    decided = torch.tensor([reference.elect_mean(*column) for column in zip(columns, signs, strict=True)])
    for values, dim, tie in ((x, 1, tie_sign), (x, -1, tie_sign.float()), (x.T, 0, tie_sign.T)):
        torch.testing.assert_close(elect_mean(values, dim), without)
        torch.testing.assert_close(elect_mean(values, dim, tie), decided)


def test_elect_mean_reduces_any_dim() -> None:
    x = torch.randn(3, 4, 5)
    want = [[reference.elect_mean(x[i, :, k].tolist()) for k in range(5)] for i in range(3)]
    torch.testing.assert_close(elect_mean(x, 1), torch.tensor(want))


# Neurons, against the SVD


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(("neurons", "n"), SIZES)
@pytest.mark.parametrize("tasks", TASKS)
def test_merged_neurons_match_the_svd_form(tasks: int, neurons: int, n: int, density: float) -> None:
    x = neurons_of(neurons, tasks, n, density)
    assert_matches_reference(x)


def test_trimming_empties_some_rows_but_not_all() -> None:
    empty = [(neurons_of(neurons, 3, n, 0.2)[:, 1:] == 0).all(dim=2).double().mean() for neurons, n in SIZES if n < 100]
    assert all(0.01 < fraction < 0.9 for fraction in empty)


@pytest.mark.parametrize(
    "special",
    [
        with_zero_base,
        with_one_task_parallel,
        with_every_task_parallel,
        with_disjoint_supports,
        with_disjoint_supports_and_zero_base,
        with_two_groups_of_disjoint_supports_and_zero_base,
        with_rows_trimmed_away,
    ],
)
@pytest.mark.parametrize(("neurons", "n"), [(200, 1), (200, 3), (100, 130), (5, 4096)])
@pytest.mark.parametrize("tasks", [2, 8])
def test_special_neurons_match_the_svd_form(
    special: Callable[[Tensor], Tensor], tasks: int, neurons: int, n: int
) -> None:
    assert_matches_reference(special(neurons_of(neurons, tasks, n)))


@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_experts_with_much_in_common_match_the_svd_form(tasks: int) -> None:
    # Their own parts are a tenth of what they share: most singular values are a tenth of the first.
    x = neurons_of(200, tasks, 257)
    shared = torch.randn(200, 1, 257, generator=torch.Generator().manual_seed(0)) * 10 * CHANGE
    own = x[:, 1:] / x[:, 1:].norm(dim=2, keepdim=True) * 257**0.5 * CHANGE
    assert_matches_reference(torch.cat([x[:, :1], shared + own], dim=1))


# Neurons, facts


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(("neurons", "n"), SIZES)
def test_one_expert_is_given_back(neurons: int, n: int, density: float) -> None:
    x = neurons_of(neurons, 1, n, density)
    assert_agree(merge_neurons(x, 1.0, 1.0), x.double().sum(dim=1), x)


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize(("neurons", "n"), FACT_SIZES)
def test_identical_experts_give_that_expert(neurons: int, n: int, tasks: int) -> None:
    alone = neurons_of(neurons, 1, n)
    x = torch.cat([alone[:, :1], alone[:, 1:].expand(-1, tasks, -1)], dim=1)
    assert_agree(merge_neurons(x, 1.0, 1.0), alone.double().sum(dim=1), x)


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize(("neurons", "n"), FACT_SIZES)
def test_psi_orth_is_orthogonal_to_the_base(neurons: int, n: int, tasks: int) -> None:
    x = neurons_of(neurons, tasks, n)
    psi_orth = change(merge_neurons(x, 0.0, 1.0), x)
    w0 = x[:, 0].double()
    along = ((psi_orth * w0).sum(dim=1) / w0.norm(dim=1)).abs()
    assert (along <= 1e-5 * psi_orth.norm(dim=1) + EPSILON * w0.norm(dim=1)).double().mean() >= 0.999
    assert (psi_orth.norm(dim=1) > 0).all()


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize(("neurons", "n"), FACT_SIZES)
def test_psi_par_is_the_elected_alpha_times_the_base(neurons: int, n: int, tasks: int) -> None:
    x = neurons_of(neurons, tasks, n)
    w0, taus = x[:, :1].double(), x[:, 1:].double()
    alphas = (taus * w0).sum(dim=2) / (w0 * w0).sum(dim=2)
    alpha = torch.tensor([reference.elect_mean(values) for values in alphas.tolist()], dtype=torch.float64)
    assert_agree(merge_neurons(x, 1.0, 0.0), (1 + alpha[:, None]) * w0[:, 0], x)


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(("neurons", "n"), FACT_SIZES)
def test_reordering_the_experts_changes_nothing(neurons: int, n: int, density: float, tasks: int) -> None:
    x = neurons_of(neurons, tasks, n, density)
    order = torch.randperm(tasks, generator=torch.Generator().manual_seed(tasks)) + 1
    reordered = torch.cat([x[:, :1], x[:, order]], dim=1)
    assert_agree(merge_neurons(reordered, 0.4, 1.5), merge_neurons(x, 0.4, 1.5), x)


@pytest.mark.parametrize("a", [0.25, 3.7, 1000.0])
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize(("neurons", "n"), FACT_SIZES)
def test_scaling_all_experts_scales_the_change(neurons: int, n: int, tasks: int, a: float) -> None:
    x = neurons_of(neurons, tasks, n)
    scaled = torch.cat([x[:, :1], a * x[:, 1:]], dim=1)
    want = x[:, 0].double() + a * change(merge_neurons(x, 0.4, 1.5), x)
    error = (merge_neurons(scaled, 0.4, 1.5).double() - want).norm(dim=1)
    rounding = EPSILON * (want.norm(dim=1) + a * x[:, 0].double().norm(dim=1))
    assert (error <= 1e-5 * change(want, x).norm(dim=1) + rounding).double().mean() >= 0.999


@pytest.mark.parametrize("along_base", [0.0, 0.5])
@pytest.mark.parametrize("tasks", TASKS)
def test_orthogonal_parts_of_distinct_norms_add_up(tasks: int, along_base: float) -> None:
    directions = torch.ones(1, 1)
    for _ in range(4):  # Hadamard: orthogonal in float32 too, exactly
        directions = torch.cat([torch.cat([directions, directions]), torch.cat([directions, -directions])], dim=1)
    parts = directions[1 : 1 + tasks] * torch.arange(1, 1 + tasks)[:, None] / 1024
    w0 = directions[0] / 64
    x = torch.stack([w0, *(parts + along_base * w0)])[None]
    assert_agree(merge_neurons(x, 0.0, 1.0), (w0 + parts.sum(dim=0))[None], x)


@pytest.mark.parametrize(("neurons", "n"), FACT_SIZES)
def test_opposite_experts_stay_finite_and_in_their_span(neurons: int, n: int) -> None:
    alone = neurons_of(neurons, 1, n)
    x = torch.cat([alone, -alone[:, 1:]], dim=1)
    merged = merge_neurons(x, 1.0, 1.0)
    assert merged.isfinite().all()
    orth = change(reference_orthogonal(alone), alone)
    candidates = [x[:, 0] + factor * orth for factor in (-1, 0, 1)]
    assert torch.stack([agreement(merged, want, alone) for want in candidates]).any(dim=0).all()


def reference_orthogonal(alone: Tensor) -> Tensor:
    return torch.stack([reference.merge_neuron(row[0], row[1:], 0.0, 1.0) for row in alone])


@pytest.mark.parametrize(("lambda_1", "lambda_2"), [(0.0, 0.0), (0.0, 1.5), (0.4, 1.0)])
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize(("neurons", "n"), [(33, 1), (33, 7), (17, 1025)])
def test_neurons_that_no_task_changes_come_back_bit_for_bit(
    neurons: int, n: int, tasks: int, lambda_1: float, lambda_2: float
) -> None:
    x = neurons_of(neurons, tasks, n).clone()
    x[::2, 1:] = 0
    x[::4, 1:] = -0.0
    x[::2, 0, ::3] = -0.0
    x[2, 0] = -0.0
    x[4, 0] = 2.0**-149
    assert_same_bits(merge_neurons(x, lambda_1, lambda_2)[::2], x[::2, 0])


@pytest.mark.parametrize("n", [1, 16])
def test_a_large_weight_that_no_task_changes_comes_back_beside_neurons_that_change(n: int) -> None:
    x = neurons_of(33, 2, n).clone()
    x[6] = 0
    x[6, 0] = 3e38  # its square is no float32
    assert_same_bits(merge_neurons(x, 0.4, 1.5)[6], x[6, 0])


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 37), (1, 8), (13, 30), (36, 101), (100, 101)])
@pytest.mark.parametrize("n", [1, 7, 128, 129, 1025])
@pytest.mark.parametrize("tasks", [1, 3, 8])
def test_a_neuron_does_not_depend_on_its_block(tasks: int, n: int, start: int, stop: int) -> None:
    x = neurons_of(101, tasks, n, 0.2)
    want = merge_neurons(x, 0.4, 1.5)[start:stop]
    assert_same_bits(merge_neurons(x[start:stop], 0.4, 1.5), want)
    assert_same_bits(merge_neurons(x[start:stop].clone(), 0.4, 1.5), want)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_weight_that_is_not_finite_is_refused(row: int, value: float) -> None:
    x = neurons_of(33, 2, 65).clone()
    x[7, row, 3] = value
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        merge_neurons(x, 0.0, 1.0)


@pytest.mark.parametrize("n", [1, 5, 64])
def test_no_neurons_give_no_neurons(n: int) -> None:
    assert merge_neurons(torch.zeros(0, 4, n), 0.0, 1.0).shape == (0, n)


# Ties and zeros, by hand


def merge_one(w0: list[float], *taus: list[float]) -> list[float]:
    """One merged neuron, lambdas 1."""
    return merge_neurons(torch.tensor([[w0, *taus]], dtype=torch.float32), 1.0, 1.0)[0].tolist()


def test_alphas_that_tie_elect_zero() -> None:
    assert merge_one([1, 0, 0], [0.5, 1, 0], [-0.5, 0, 2]) == pytest.approx([1, 1, 2])


def test_alphas_elect_the_sign_of_their_sum() -> None:
    assert merge_one([2, 0, 0], [1, 1, 0], [-0.5, 0, 2]) == pytest.approx([2 + 1, 1, 2])
    assert merge_one([2, 0, 0, 0], [1, 1, 0, 0], [-0.5, 0, 2, 0], [-1, 0, 0, 4]) == pytest.approx([2 - 0.75, 1, 2, 4])


def test_an_alpha_of_zero_is_not_counted() -> None:
    assert merge_one([1, 0, 0, 0], [0.5, 1, 0, 0], [0, 0, 2, 0], [0.25, 0, 0, 4]) == pytest.approx([1.375, 1, 2, 4])


def test_a_task_without_an_orthogonal_part_is_not_counted() -> None:
    # Counted, the rounding it leaves would halve the other task's share.
    assert merge_one([0.3, 0.1, 0.7], [0.03, 0.01, 0.07], [0.7, 0, -0.3]) == pytest.approx([1.03, 0.11, 0.47])


def test_a_task_without_a_coordinate_is_not_counted() -> None:
    assert merge_one([0, 0, 0], [3, 0, 0], [0, 2, 2], [0, 0, 0]) == pytest.approx([3, 2, 2])


def test_a_direction_that_ties_takes_the_sign_of_the_other() -> None:
    # U = [[1, 1], [1, -1]] / sqrt(2). The first direction elects 3; the second ties, and follows the first to 2 or to
    # -2, for the SVD leaves the relative sign of two directions open.
    first, second, third = merge_one([0, 0, 0], [3, 2, 0], [3, -2, 0])
    assert (first, abs(second), third) == pytest.approx((3, 2, 0))


def test_a_direction_that_ties_alone_elects_zero() -> None:
    # tau_2 = -tau_1: nothing else can decide, a direction of length 0 has no sign.
    assert merge_one([1, 0, 0], [0, 2, 0], [0, -2, 0]) == pytest.approx([1, 0, 0])


# Parameters without neurons


@modest
@given(st.data())
def test_elementwise_matches_reference(data: st.DataObject) -> None:
    tasks, n = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 12))
    quarter = st.integers(-4, 4).map(lambda value: value / 4)
    entries = data.draw(st.lists(quarter, min_size=tasks * n, max_size=tasks * n))
    taus = torch.tensor(entries).reshape(tasks, n)
    base = torch.linspace(-1, 1, n)
    got = merge_elementwise(base, taus, 1.5)
    assert (got.dtype, got.shape) == (torch.float32, (n,))
    torch.testing.assert_close(got.double(), reference.merge_vector(base, taus, 1.5), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("tasks", TASKS)
def test_elementwise_matches_reference_on_a_large_parameter(tasks: int, density: float) -> None:
    base, *taus = neurons_of(1, tasks, 4096, density)[0]
    want = reference.merge_vector(base, torch.stack(taus), 1.5)
    torch.testing.assert_close(merge_elementwise(base, torch.stack(taus), 1.5).double(), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("taus", "psi"),
    [
        ([[2, 1, 1], [-2, 1, 1]], [2, 1, 1]),  # the others are positive
        ([[2, -1, -1], [-2, -1, -1]], [-2, -1, -1]),
        ([[2, -1, 5], [-2, -1, 5]], [0, -1, 5]),  # the others tie too: they count by sign, not by size
        ([[2, 3], [-2, -3]], [0, 0]),  # nobody decides
        ([[2], [-2]], [0]),
        ([[2, 0], [-2, -1], [3, 0], [-3, 0]], [-2.5, -1]),  # what is 0 is not counted
        ([[0, 1], [0, 1]], [0, 1]),  # no sign to elect
    ],
)
def test_entries_that_tie_take_the_sign_of_the_others(taus: list[list[float]], psi: list[float]) -> None:
    base = torch.full((len(psi),), 8.0)
    assert merge_elementwise(base, torch.tensor(taus, dtype=torch.float32), 0.5).tolist() == [8 + p / 2 for p in psi]


def test_a_parameter_that_no_task_changes_comes_back_bit_for_bit() -> None:
    base = torch.tensor([-0.0, 0.0, 1e-45, -3e38])
    assert_same_bits(merge_elementwise(base, torch.zeros(3, 4), 1.5), base)
    assert_same_bits(merge_elementwise(base, torch.full((3, 4), -0.0), 1.5), base)
