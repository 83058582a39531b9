"""A merge's bytes depend on its inputs alone: not on threads, not on the run, not on the size of blocks.

Whole output directories are compared, with models whose rows are of odd lengths and blocks that do not fit into them.
"""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine_runs import merged_weights
from families import Relatives
from neuromerge_hf import NeuroMergingConfig, merge, plan_merge
from neuromerge_hf.engine.passes import Passes
from neuromerge_hf.sources.task_vector import LowRank
from neuromerge_hf.storage.layout import Layout
from tiny_models import contents, save_adapter, save_fine_tune, save_llama, seeded

BOTH_PARTS = NeuroMergingConfig(density=0.3, lambda_parallel=0.5)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base with rows of 39 and 51 entries; two fine-tunes and two adapters of it."""
    folder = tmp_path_factory.mktemp("odd")
    base = save_llama(
        folder / "base", hidden_size=39, num_attention_heads=3, num_key_value_heads=1, head_dim=6, intermediate_size=51
    )
    fine_tunes = [save_fine_tune(base, folder / f"full-{seed}", seed=seed) for seed in (1, 2)]
    adapters = [save_adapter(base, folder / f"lora-{seed}", seed=seed, r=r) for seed, r in ((3, 5), (4, 9))]
    return [base, *fine_tunes, *adapters]


@pytest.fixture(scope="module")
def transposed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base with fused experts whose neurons are columns; two fine-tunes and an adapter of it."""
    relatives = Relatives("gpt-oss", tmp_path_factory.mktemp("transposed"))
    return [relatives.base, relatives.full(0), relatives.full(1), relatives.adapter(2)]


def merged_bytes(
    models: list[Path], output: Path, threads: int = 1, config: NeuroMergingConfig = BOTH_PARTS
) -> dict[str, bytes]:
    base, *experts = models
    merge(experts, output, base_model=base, config=config, device="cpu", threads=threads)
    return contents(output)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_bytes(threads: int, models: list[Path], tmp_path: Path) -> None:
    want = merged_bytes(models, tmp_path / "want")
    assert merged_bytes(models, tmp_path / "got", threads) == want
    assert {"model.safetensors", "recipe.yaml", "config.json"} <= want.keys()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_that_share_a_tensor_give_the_same_bytes(threads: int, models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    plan = plan_merge(experts, base_model=base, config=BOTH_PARTS)
    want = merged_weights(plan, tmp_path / "want")
    got = merged_weights(plan, tmp_path / "got", threads=threads, block_entries=150)
    assert got.files == want.files
    assert got.diagnostics == want.diagnostics


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("entries", [1, 150, sys.maxsize])
def test_adapters_merged_from_their_factors_give_the_same_bytes(
    entries: int, threads: int, models: list[Path], tmp_path: Path
) -> None:
    base, _, _, *adapters = models
    whole = NeuroMergingConfig(density=1, lambda_parallel=0.5)
    plan = plan_merge(adapters, base_model=base, config=whole)
    want = merged_weights(plan, tmp_path / "want")
    got = merged_weights(plan, tmp_path / "got", threads=threads, block_entries=entries)
    assert got.files == want.files
    assert got.diagnostics == want.diagnostics


@pytest.mark.parametrize("threads_of_torch", [1, 2])
def test_torchs_own_threads_change_nothing(threads_of_torch: int, models: list[Path], tmp_path: Path) -> None:
    want = merged_bytes(models, tmp_path / "want")
    before = torch.get_num_threads()
    torch.set_num_threads(threads_of_torch)
    try:
        assert merged_bytes(models, tmp_path / "got", 2) == want
        assert torch.get_num_threads() == threads_of_torch
    finally:
        torch.set_num_threads(before)


def test_the_first_product_of_a_thread_is_not_split_over_threads(models: list[Path]) -> None:
    with seeded(0):
        left, right = torch.randn(6, 5), torch.randn(5, 39)
    plan = plan_merge(models[1:], base_model=models[0])
    passes = Passes(plan.work, torch.device("cpu"), threads=2)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    want = left @ right
    torch.set_num_threads(2)
    try:
        for _ in range(10):  # each with threads of its own
            products = [
                product
                for _, products in passes.run(lambda unit: (passes.blocks(unit), lambda block: left @ right))
                for product in products
            ]
            assert len(products) == len(plan.units)
            assert all(torch.equal(product, want) for product in products)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("entries", [1, 100, 1000, sys.maxsize])
def test_any_size_of_blocks_gives_the_same_bytes(
    entries: int, kind: str, models: list[Path], transposed: list[Path], tmp_path: Path
) -> None:
    base, *experts = {"rows": models, "columns": transposed}[kind]
    plan = plan_merge(experts, base_model=base, config=BOTH_PARTS)
    want = merged_weights(plan, tmp_path / "want")
    got = merged_weights(plan, tmp_path / "got", threads=2, block_entries=entries)
    assert got.files == want.files
    assert got.diagnostics == want.diagnostics


@pytest.mark.parametrize("width", [1, 39, 64, 513])
@pytest.mark.parametrize("r", [1, 5, 16, 33, 64])
def test_a_row_of_an_adapter_does_not_depend_on_its_block(r: int, width: int) -> None:
    with seeded(r):
        left, right = torch.randn(150, r), torch.randn(r, width)
    vector = LowRank(left, right, Layout.of((150, width), 0), "adapter")

    def formed(rows: int) -> torch.Tensor:
        out = torch.empty(150, width)
        for block in vector.layout.blocks(rows * width):
            vector.write(out[block.start : block.stop], block, out, out)
        return out

    want = formed(150)
    torch.testing.assert_close(want, left @ right)
    for rows in (*range(1, 67), 100, 149):
        assert torch.equal(formed(rows), want)


def test_the_order_of_experts_hardly_matters(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    want = merge(experts, tmp_path / "want", base_model=base, config=BOTH_PARTS, device="cpu", threads=1)
    got = merge(experts[::-1], tmp_path / "got", base_model=base, config=BOTH_PARTS, device="cpu", threads=1)
    by_name = {expert.name: (expert.threshold, expert.sigma, expert.entries) for expert in want.experts}
    assert by_name == {expert.name: (expert.threshold, expert.sigma, expert.entries) for expert in got.experts}
    assert got.lambda_orthogonal == want.lambda_orthogonal
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("want", "got"))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-5, atol=1e-7)
