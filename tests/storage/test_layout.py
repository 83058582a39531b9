"""`Layout` against plain indexing: the same neurons, from reading a tensor's flat entries run by run."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuromerge_hf.storage.layout import Block, Layout

modest = settings(deadline=None, max_examples=150, derandomize=True)
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(tuple)
block_sizes = st.integers(1, 200)


def numbered(shape: tuple[int, ...]) -> Tensor:
    """A tensor whose entries all differ."""
    return torch.arange(float(math.prod(shape))).view(shape)


def neurons_of(tensor: Tensor, axis: int | None) -> Tensor:
    """A tensor's neurons as rows, by plain indexing."""
    if axis is None:
        return tensor.reshape(1, -1)
    return torch.stack([tensor.select(axis, i).flatten() for i in range(tensor.shape[axis])])


def read(tensor: Tensor, layout: Layout, block: Block) -> Tensor:
    """A block, as it is read from a file."""
    flat = tensor.flatten()
    return layout.to_rows(torch.cat([flat[start:stop] for start, stop in layout.runs(block)]), block)


def assert_round_trip(tensor: Tensor, layout: Layout, neurons: Tensor, entries: int) -> None:
    """All blocks together are the neurons, and writing them back gives the tensor."""
    assert (layout.rows, layout.width) == neurons.shape
    blocks = list(layout.blocks(entries))
    assert torch.equal(torch.cat([read(tensor, layout, block) for block in blocks]), neurons)
    assert all(1 <= len(block) <= max(1, entries // layout.width) for block in blocks)
    written = torch.full((tensor.numel(),), math.nan)
    for block in blocks:
        stored = layout.from_rows(read(tensor, layout, block), block)
        assert stored.is_contiguous()
        data = stored.flatten()
        for start, stop in layout.runs(block):
            assert written[start:stop].isnan().all(), "an entry is written twice"
            written[start:stop], data = data[: stop - start], data[stop - start :]
        assert not len(data)
    assert torch.equal(written.view(tensor.shape), tensor)


@modest
@given(st.data(), shapes, block_sizes)
def test_neurons_along_any_axis(data: st.DataObject, shape: tuple[int, ...], entries: int) -> None:
    axis = data.draw(st.none() | st.integers(0, len(shape) - 1))
    tensor = numbered(shape)
    assert_round_trip(tensor, Layout.of(shape, axis), neurons_of(tensor, axis), entries)


@modest
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 2]), block_sizes)
def test_neurons_of_fused_experts(experts: int, rows: int, columns: int, axis: int, entries: int) -> None:
    tensor = numbered((experts, rows, columns))
    neurons = torch.cat([neurons_of(expert, axis - 1) for expert in tensor])
    assert_round_trip(tensor, Layout.of_experts((experts, rows, columns), axis), neurons, entries)


@modest
@given(st.data(), shapes)
def test_any_block_is_rows_of_the_whole(data: st.DataObject, shape: tuple[int, ...]) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    start = data.draw(st.integers(0, shape[axis] - 1))
    stop = data.draw(st.integers(start + 1, shape[axis]))
    tensor, layout = numbered(shape), Layout.of(shape, axis)
    block = Block(0, start, stop)
    assert torch.equal(read(tensor, layout, block), neurons_of(tensor, axis)[start:stop])
    assert torch.equal(
        layout.to_rows(layout.from_rows(read(tensor, layout, block), block), block), read(tensor, layout, block)
    )


@modest
@given(st.data(), shapes, block_sizes)
def test_the_runs_of_all_blocks_are_the_tensor(data: st.DataObject, shape: tuple[int, ...], entries: int) -> None:
    layout = Layout.of(shape, data.draw(st.none() | st.integers(0, len(shape) - 1)))
    runs = sorted(itertools.chain.from_iterable(layout.runs(block) for block in layout.blocks(entries)))
    assert [start for start, _ in runs] == [0, *(stop for _, stop in runs[:-1])]
    assert runs[-1][1] == math.prod(shape)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout.of((8, 3), 0), Layout(1, 1, 8, 3)),
        (Layout.of((3, 8), 1), Layout(1, 3, 8, 1)),
        (Layout.of((8, 3, 2, 2), 0), Layout(1, 1, 8, 12)),
        (Layout.of((3, 8, 2, 2), 1), Layout(1, 3, 8, 4)),
        (Layout.of((1, 8, 3), 1), Layout(1, 1, 8, 3)),
        (Layout.of((3, 4), None), Layout(1, 1, 1, 12)),
        (Layout.of((), None), Layout(1, 1, 1, 1)),
        (Layout.of_experts((5, 8, 3), 1), Layout(1, 1, 40, 3)),
        (Layout.of_experts((5, 3, 8), 2), Layout(5, 3, 8, 1)),
    ],
)
def test_known_layouts(layout: Layout, expected: Layout) -> None:
    assert layout == expected


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
@pytest.mark.parametrize("entries", [1, 100])
def test_a_tensor_without_entries_has_no_runs_with_any(shape: tuple[int, ...], entries: int) -> None:
    layout = Layout.of(shape, 0)
    assert sum(stop - start for block in layout.blocks(entries) for start, stop in layout.runs(block)) == 0
