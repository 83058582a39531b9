"""The reference itself, against values worked out by hand and against modules' own outputs."""

import pytest
import torch
from torch import Tensor, nn

import reference
from reference import Neurons

TAU = [torch.tensor([0.1, -0.2, 0.3, -0.4, 0.5]), torch.tensor([[-0.6, 0.7], [-0.8, 0.9]]), torch.tensor(1.0)]


@pytest.mark.parametrize(("density", "expected"), [(1.0, 0.0), (0.9, 0.1), (0.7, 0.3), (0.2, 0.8), (0.05, 0.9)])
def test_threshold_is_the_jth_smallest_magnitude_in_exact_arithmetic(density: float, expected: float) -> None:
    # In binary, (1 - 0.9) * 10 is a little under 1: rounding it down would keep everything.
    assert reference.threshold(TAU, density) == float(torch.tensor(expected))


@pytest.mark.parametrize(
    ("values", "tie_sign", "expected"),
    [
        ([3.0, -1.0, -1.0], 0, 3.0),
        ([3.0, 1.0, 0.0], 0, 2.0),
        ([2.0, -2.0], 0, 0.0),
        ([2.0, -2.0], -1, -2.0),
        ([0.0, 0.0], 1, 0.0),
    ],
)
def test_elect_mean(values: list[float], tie_sign: int, expected: float) -> None:
    assert reference.elect_mean(values, tie_sign) == expected


def test_neuron_by_hand() -> None:
    w0 = torch.tensor([2.0, 0.0, 0.0])
    taus = torch.tensor([[1.0, 3.0, 0.0], [-0.5, 0.0, 2.0], [0.25, 0.0, 0.0]])
    # alpha = (0.5, -0.25, 0.125): elects mean(0.5, 0.125); the orthogonal parts, the third zero, just add up.
    expected = torch.tensor([2 + 0.5 * 2 * 0.3125, 1.5 * 3, 1.5 * 2], dtype=torch.float64)
    torch.testing.assert_close(reference.merge_neuron(w0, taus, 0.5, 1.5), expected)


def test_a_direction_that_ties_takes_the_sign_of_the_other_or_nothing() -> None:
    taus = torch.tensor([[0.0, 0.3, 0.2], [0.0, 0.3, -0.2]])
    along, across = reference.merge_neuron(torch.tensor([1.0, 0.0, 0.0]), taus, 0.0, 1.0)[1:].tolist()
    assert (along, abs(across)) == pytest.approx((0.3, 0.2))
    opposite = torch.tensor([[0.0, 0.3, 0.2], [0.0, -0.3, -0.2]])
    assert reference.merge_neuron(torch.tensor([1.0, 0.0, 0.0]), opposite, 0.0, 1.0).tolist() == [1, 0, 0]


def test_vector_ties_follow_the_other_entries() -> None:
    taus = torch.tensor([[1.0, -3.0, -4.0, 5.0], [-1.0, 0.0, -2.0, 0.0]])
    expected = torch.tensor([-2.0, -6.0, -6.0, 10.0], dtype=torch.float64)
    assert torch.equal(reference.merge_vector(torch.zeros(4), taus, 2.0), expected)


@pytest.mark.parametrize(
    ("module", "view", "example"),
    [
        (nn.Linear(3, 4, bias=False), reference.LINEAR, torch.ones(1, 3)),
        (nn.Conv2d(2, 4, (3, 2), bias=False), reference.CONV, torch.ones(1, 2, 3, 2)),
        (nn.ConvTranspose1d(2, 4, 3, bias=False), reference.CONV_TRANSPOSE, torch.ones(1, 2, 1)),
    ],
)
def test_a_neuron_feeds_one_output_unit(module: nn.Module, view: Neurons, example: Tensor) -> None:
    weight = module.weight.detach()
    rows = view.to_rows(weight).clone()
    rows[[0, 1, 3]] = 0
    module.weight.data = view.from_rows(rows, weight.shape)
    outputs = module(example).detach().transpose(0, 1).flatten(1)
    assert outputs.any(dim=1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1), (0, 2)])
def test_rows_go_back_where_they_came_from(axes: tuple[int, ...]) -> None:
    weight = torch.arange(24.0).reshape(2, 3, 4)
    view = Neurons(axes)
    assert torch.equal(view.from_rows(view.to_rows(weight), weight.shape), weight)


def test_rows_of_fused_experts_are_each_expert_output_units() -> None:
    weight = torch.arange(24.0).reshape(2, 3, 4)
    by_expert = [row for expert in weight for row in expert]
    assert torch.equal(reference.FUSED_EXPERTS.to_rows(weight), torch.stack(by_expert))
    assert torch.equal(reference.FUSED_EXPERTS_TRANSPOSED.to_rows(weight.transpose(1, 2)), torch.stack(by_expert))


def tiny_model(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {"weight": torch.randn(4, 6), "bias": torch.randn(4), "scale": torch.randn(()), "steps": torch.tensor(seed)}


VIEWS = {"weight": reference.LINEAR, "bias": None, "scale": None}


def test_one_untrimmed_expert_is_given_back() -> None:
    base, expert = tiny_model(0), tiny_model(1)
    merged, info = reference.merge_model(base, [expert], VIEWS, density=1.0, lambda_1=1.0)
    assert info == {"sigma": 0.0, "sigma_t": [0.0], "thresholds": [0.0], "lambda_2": 1.0}
    assert merged["steps"] is base["steps"]
    for name in VIEWS:
        torch.testing.assert_close(merged[name], expert[name].double(), rtol=1e-6, atol=1e-6)


def test_each_expert_is_trimmed_over_what_it_may_change() -> None:
    base = {"weight": torch.zeros(1, 4), "bias": torch.zeros(4), "scale": torch.tensor(-0.0)}
    wide = {"weight": torch.tensor([[1.0, 2.0, 3.0, 4.0]]), "bias": torch.tensor([0.0, 8.0, 0.0, 6.0])}
    narrow = {"bias": torch.tensor([4.0, 3.0, 2.0, -1.0])}
    merged, info = reference.merge_model(base, [wide, narrow], VIEWS, density=0.5, lambda_1=0.0)
    # 4 of 8 entries of `wide` go up to 2 (0, 0, 1, 2), 2 of 4 of `narrow`; the thresholds themselves stay.
    assert info["thresholds"] == [2.0, 2.0]
    assert info["sigma_t"] == [1 / 24, 1 / 10]
    assert info["lambda_2"] == pytest.approx(1 / 0.9)
    assert merged["scale"] is base["scale"]
    torch.testing.assert_close(merged["weight"] * 0.9, torch.tensor([[0.0, 2, 3, 4]], dtype=torch.float64))
    torch.testing.assert_close(merged["bias"] * 0.9, torch.tensor([4.0, 5.5, 2, 6], dtype=torch.float64))


def test_experts_that_change_nothing_have_no_sigma() -> None:
    base = tiny_model(0)
    merged, info = reference.merge_model(base, [base, {}], VIEWS, density=0.2, lambda_1=0.0)
    assert info["sigma_t"] == [0.0, 0.0]
    assert all(merged[name] is base[name] for name in base)
