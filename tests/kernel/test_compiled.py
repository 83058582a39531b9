"""The compiled kernel against `kernel`, whose definitions it follows, in float64 or to the bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuromerge_hf.engine.blocks import Memory
from neuromerge_hf.engine.cpu_kernel import CPUKernel, kernel_name
from neuromerge_hf.kernel import gram_matrix, trim

if kernel_name("cpu") == "torch":
    pytest.skip("numba is not installed, or turned off", allow_module_level=True)
compiled = pytest.importorskip("neuromerge_hf.compiled")
KERNEL = CPUKernel(compiled)

WIDTHS = (1, 7, 8, 511, 512, 513, 1300)  # around a chunk of 512, and of odd lengths
DTYPES = (torch.bfloat16, torch.float32)

modest = settings(deadline=None, max_examples=60, derandomize=True)
blocks = st.tuples(
    st.integers(1, 9), st.integers(1, 5), st.sampled_from(WIDTHS), st.sampled_from(DTYPES), st.integers(0, 99)
)


def block_of(tasks: int, neurons: int, width: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, list[float]]:
    """A block as it is stored, the base and the untrimmed task vectors in float32, and thresholds.

    The thresholds are magnitudes that occur, so that some entries are equal to them. The last one is 0. Some entries,
    and all of one neuron, do not change.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = (
        torch.randn(1 + tasks, neurons, width, generator=generator)
        * torch.tensor([0.02] + tasks * [1e-3])[:, None, None]
    )
    rows[1:, :, ::5] = 0
    rows[1:, -1] = 0
    if dtype == torch.bfloat16:
        stored = torch.cat([rows[:1], rows[:1] + rows[1:]]).bfloat16()
        rows = torch.cat([stored[:1].float(), stored[1:].float() - stored[:1].float()])
    else:
        stored = rows.clone()
    thresholds = [row.abs().flatten().sort().values[int(0.7 * row.numel())].item() for row in rows[1:]]
    return stored, rows, [*thresholds[:-1], 0.0]


def trimmed(rows: Tensor, thresholds: list[float]) -> Tensor:
    return torch.stack([rows[0], *(trim(row, threshold) for row, threshold in zip(rows[1:], thresholds, strict=True))])


@modest
@given(blocks)
def test_the_gram_matrix_is_that_of_the_trimmed_rows(shape):
    stored, rows, thresholds = block_of(*shape)
    want = gram_matrix(trimmed(rows, thresholds).transpose(0, 1))
    got = KERNEL.gram_matrix(stored, thresholds)
    lengths = want.diagonal(dim1=1, dim2=2).sqrt()
    assert ((got - want).abs() <= 1e-13 * lengths.unsqueeze(1) * lengths.unsqueeze(2)).all()
    assert torch.equal(got, got.mT)
    assert torch.equal(got == 0, want == 0), "a task without entries has no energy at all"


@modest
@given(blocks, st.sampled_from([torch.bfloat16, torch.float32, torch.float16, torch.float64]))
def test_a_merged_neuron_is_the_combination_of_its_trimmed_rows(shape, dtype):
    stored, rows, thresholds = block_of(*shape)
    coefficients = torch.randn(rows.shape[1], len(rows), generator=torch.Generator().manual_seed(1))
    got = KERNEL.combine(stored, thresholds, coefficients, dtype)
    x = trimmed(rows, thresholds).double()
    want = x[0] + torch.einsum("nt,tnw->nw", coefficients.double(), x)
    largest = x[0].abs() + torch.einsum("nt,tnw->nw", coefficients.double().abs(), x.abs())
    exact = KERNEL.combine(stored, thresholds, coefficients, torch.float32)
    assert ((exact - want).abs() <= len(rows) * torch.finfo(torch.float32).eps * largest).all()
    assert got.dtype == dtype
    assert torch.equal(got, exact.to(dtype)), "rounded once"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_neuron_without_coefficients_keeps_its_bits(dtype):
    stored, _, thresholds = block_of(3, 4, 600, dtype, seed=5)
    stored[0, :, ::3] = -0.0
    merged = KERNEL.combine(stored, thresholds, torch.zeros(4, 4), dtype)
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert torch.equal(merged.view(bits), stored[0].view(bits))


def test_every_float32_is_rounded_to_bfloat16_as_torch_does():
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = torch.from_numpy((high[:, None] | low).ravel().view(np.float32))
    x = torch.stack([values, torch.zeros_like(values)]).unsqueeze(1)
    got = KERNEL.combine(x, [0.0], torch.zeros(1, 2), torch.bfloat16)[0]
    want = values.bfloat16()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.view(torch.int16)[~want.isnan()], want.view(torch.int16)[~want.isnan()])


@modest
@given(blocks, st.floats(0, 1), st.floats(0, 1))
def test_magnitudes_are_counted_below_and_in_a_range(shape, one, other):
    stored, rows, _ = block_of(*shape)
    magnitudes = rows[-1].abs()
    ordered = magnitudes.flatten().sort().values
    low, high = sorted(ordered[int(share * (len(ordered) - 1))].item() for share in (one, other))
    below, bits, norms = KERNEL.count(stored, len(rows) - 1, low, high, Memory())
    assert below == (magnitudes < low).sum()
    assert torch.equal(bits.view(torch.float32), magnitudes[(magnitudes >= low) & (magnitudes < high)])
    kept = magnitudes.where(magnitudes >= low, 0.0)
    assert torch.allclose(norms, torch.stack([magnitudes, kept]).sum(2, dtype=torch.float64), rtol=1e-6)


@modest
@given(blocks)
def test_a_neuron_does_not_depend_on_the_others(shape):
    stored, rows, thresholds = block_of(*shape)
    coefficients = torch.randn(rows.shape[1], len(rows), generator=torch.Generator().manual_seed(1))
    gram = KERNEL.gram_matrix(stored, thresholds)
    merged = KERNEL.combine(stored, thresholds, coefficients, torch.float32)
    norms = KERNEL.count(stored, 1, 0.0, 1e-3, Memory())[2]
    for neuron in range(rows.shape[1]):
        alone = stored[:, neuron : neuron + 1].contiguous()
        assert torch.equal(KERNEL.gram_matrix(alone, thresholds), gram[neuron : neuron + 1])
        one = KERNEL.combine(alone, thresholds, coefficients[neuron : neuron + 1], torch.float32)
        assert torch.equal(one, merged[neuron : neuron + 1])
        assert torch.equal(KERNEL.count(alone, 1, 0.0, 1e-3, Memory())[2], norms[:, neuron : neuron + 1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_no_nan_or_infinity_is_trimmed_away(bad, row, dtype, threshold):
    stored, _, _ = block_of(2, 3, 700, dtype, seed=1)
    stored[row, 1, 650] = bad
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        KERNEL.gram_matrix(stored, [threshold, threshold])
    if row:
        norms = KERNEL.count(stored, row, 0.0, 1.0, Memory())[2]
        assert not norms.isfinite().all()
