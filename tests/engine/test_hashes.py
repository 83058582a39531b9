"""The sha256 of weight files, computed while they are written, against hashlib on the whole files."""

import hashlib
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine_runs import merged_weights
from families import Relatives
from neuromerge_hf import MergePlan, NeuroMergingConfig, plan_merge
from neuromerge_hf.engine import hashing
from neuromerge_hf.engine.writer import CheckpointWriter
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.layout import Block, Layout
from neuromerge_hf.storage.tensors import MemoryTensor
from tiny_models import save_adapter, save_fine_tune, save_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("hashes") / "base")


@pytest.fixture(scope="module")
def plan(base: Path) -> MergePlan:
    experts = [save_fine_tune(base, base.parent / "full", seed=1), save_adapter(base, base.parent / "lora", seed=2)]
    return plan_merge(experts, base_model=base, config=NeuroMergingConfig(density=1))


def hashes_of(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name.endswith(".safetensors")}


def copied(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Unit:
    """A unit that is copied from a tensor in memory."""
    layout = Layout(1, 1, tensor.numel(), 1)
    return Unit(MemoryTensor(name, tensor, Path("memory")), name, layout, False, (), dtype or tensor.dtype)


def write(writer: CheckpointWriter, units: Iterable[Unit]) -> None:
    """Write units whole, in their order, and finish them."""
    for unit in units:
        rows = torch.empty(unit.entries, dtype=unit.tensor.dtype)
        unit.tensor.read(0, unit.entries, rows)
        if unit.entries:
            writer.write(unit, Block(0, 0, unit.entries), rows.view(-1, 1))
        writer.finish(unit)


# Merges


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("shard", "files"), [("5GB", 1), (20_000, 4)])
def test_hashes_are_those_of_the_files(shard: str | int, files: int, threads: int, plan: MergePlan, tmp_path: Path):
    merged = merged_weights(plan, tmp_path / "out", shard, threads=threads, block_entries=150)
    assert len(merged.hashes) == files
    assert merged.hashes == hashes_of(merged.files)


@pytest.mark.parametrize("family", ["gpt2", "gpt-oss"])
def test_so_are_those_of_weights_whose_neurons_are_columns(family: str, tmp_path: Path) -> None:
    relatives = Relatives(family, tmp_path / family)
    plan = plan_merge([relatives.full(0), relatives.full(1)], base_model=relatives.base)
    merged = merged_weights(plan, tmp_path / "out", threads=2, block_entries=100)
    assert merged.hashes == hashes_of(merged.files)


def test_a_merge_that_fails_has_no_hashes(plan: MergePlan, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, plan.units, "5GB", hashed=True)
    write(writer, [copied(unit.tensor.name, torch.ones(unit.tensor.shape)) for unit in plan.units[:-1]])
    writer.close()
    assert writer.hashes == {}


def test_there_are_none_where_none_are_asked_for(tmp_path: Path) -> None:
    units = [copied("weight", torch.ones(5))]
    writer = CheckpointWriter(tmp_path, units, "5GB")
    write(writer, units)
    writer.close()
    assert writer.hashes == {}
    assert torch.equal(load_file(tmp_path / "model.safetensors")["weight"], torch.ones(5))


# Orders and forms


@pytest.mark.parametrize("reverse", [False, True])
def test_wide_narrow_whole_and_empty_tensors_in_any_order(reverse: bool, tmp_path: Path) -> None:
    # In the file wide dtypes come first; units are finished in the order of their names, or in the opposite one.
    units = [
        copied("a.position_ids", torch.arange(7)),
        copied("b.weight", torch.randn(5, 3), torch.bfloat16),
        copied("c.empty", torch.empty(0, 4)),
        copied("d.weight", torch.randn(6)),
        copied("e.mask", torch.tensor([True, False, True])),
        copied("f.empty", torch.empty(0), torch.float16),
        copied("g.scale", torch.tensor(2.0, dtype=torch.float64)),
    ]
    writer = CheckpointWriter(tmp_path, units, "5GB", hashed=True)
    write(writer, units[::-1] if reverse else units)
    writer.close()
    assert writer.hashes == hashes_of({"model.safetensors": (tmp_path / "model.safetensors").read_bytes()})
    written = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == {
        unit.tensor.name: unit.tensor.shape for unit in units
    }


def test_a_file_of_nothing_but_empty_tensors_is_hashed(tmp_path: Path) -> None:
    units = [copied("a", torch.empty(0)), copied("b", torch.empty(0, 3))]
    writer = CheckpointWriter(tmp_path, units, "5GB", hashed=True)
    writer.close()  # a pass over units finishes none without blocks
    assert writer.hashes == hashes_of({"model.safetensors": (tmp_path / "model.safetensors").read_bytes()})


def test_bytes_are_hashed_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[tuple[int, int]] = []
    arrived = threading.Event()
    update = hashing.FileHasher._update

    def noted(self: hashing.FileHasher, start: int, stop: int) -> None:
        update(self, start, stop)
        hashed.append((start, stop))
        if len(hashed) == 3:  # the header and two tensors
            arrived.set()

    monkeypatch.setattr(hashing.FileHasher, "_update", noted)
    units = [copied(name, torch.ones(1000)) for name in "abc"]
    writer = CheckpointWriter(tmp_path, units, "5GB", hashed=True)
    write(writer, units[:2])
    assert arrived.wait(10)
    write(writer, units[2:])
    writer.close()
    starts, stops = zip(*hashed, strict=True)
    assert starts == (0, *stops[:-1])  # one after the other, each byte once
    assert stops[-1] == (tmp_path / "model.safetensors").stat().st_size
