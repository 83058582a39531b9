"""`.bin` files: what torch loads as plain tensors is read in ranges, and nothing else is."""

import os
import random
import time
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from headers import same
from neuromerge_hf import MergeError
from neuromerge_hf.storage.formats import open_file
from neuromerge_hf.storage.tensors import read_whole
from pickles import plain_tensors, read_parts, torch_tensors
from process_work import run_command
from processes import finish, start
from tiny_models import save_fine_tune, save_llama

FORMATS = pytest.mark.parametrize("archive", [True, False], ids=["archive", "old file"])


def saved(path: Path, state: object, archive: bool = True) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=archive)
    return path


def message_of(path: Path) -> str:
    with pytest.raises(MergeError) as caught:
        open_file(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@given(seed=st.integers(0, 2**32), archive=st.booleans())
@settings(max_examples=200, deadline=None)
def test_views_parameters_and_shared_storages_are_read_as_torch_reads_them(seed: int, archive: bool) -> None:
    rng = random.Random(seed)
    state = {name: x for name, x in plain_tensors(rng).items() if archive or name not in ("uint16", "float8")}
    with TemporaryDirectory() as folder:
        path = saved(Path(folder) / "pytorch_model.bin", state, archive)
        want = torch_tensors(path)
        assert want is not None
        tensors = open_file(path)
        assert tensors.keys() == want.keys()
        for name, tensor in tensors.items():
            assert same(read_parts(tensor, rng), want[name]), name
            assert same(read_whole(tensor), want[name]), name


@FORMATS
def test_a_file_of_parameters_is_read(archive: bool, tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    path = saved(tmp_path / "a.bin", {"weight": layer.weight, "bias": layer.bias}, archive)
    assert torch.equal(read_whole(open_file(path)["weight"]), layer.weight)


@FORMATS
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["meta", "sparse", "rows", "quantised"])
def test_tensors_without_plain_entries_are_refused(kind: str, archive: bool, tmp_path: Path) -> None:
    tensor = {
        "meta": lambda: torch.zeros(3, device="meta"),
        "sparse": lambda: torch.eye(3).to_sparse(),
        "rows": lambda: torch.eye(3).to_sparse_csr(),
        "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    }[kind]()
    assert "plain tensor" in message_of(saved(tmp_path / "a.bin", {"a": torch.ones(2), "b": tensor}, archive))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"<!DOCTYPE html>", b"\x80\x02", bytes(99)])
def test_a_file_that_is_no_pickle_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    message_of(tmp_path / "a.bin")


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    message_of(tmp_path / "missing.bin")


def test_an_archive_that_is_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", {"a": torch.ones(300)})
    content = path.read_bytes()
    for size in range(0, len(content), 7):
        path.write_bytes(content[:size])
        message_of(path)


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", {"a": torch.ones(4), "b": torch.ones(400)})
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content[:8] if name == "a/data/0" else content)
    assert "a ends after the end of its storage" in message_of(path)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", {"a": torch.ones(4)})
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    assert "compressed" in message_of(path)


def test_a_file_that_loses_bytes_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", {"a": torch.ones(1 << 20), "b": torch.ones(1 << 10, 1 << 10).T})
    tensors = open_file(path)
    os.truncate(path, 100_000)
    for tensor in tensors.values():
        with pytest.raises(MergeError, match=f"{path} ended early"):
            read_whole(tensor)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_merge_whose_input_loses_bytes_ends_in_an_error(name: str, tmp_path: Path) -> None:
    # In a process of its own, because reading a mapped file that became shorter ends a process by a signal.
    base = save_llama(tmp_path / "base", vocab_size=40_000, hidden_size=64)
    expert = save_fine_tune(base, tmp_path / "expert", seed=1)
    if name.endswith(".bin"):
        saved(expert / name, load_file(expert / "model.safetensors"))
        (expert / "model.safetensors").unlink()
    (tmp_path / "made").mkdir()
    merging = start(
        run_command,
        *("merge", str(expert), "--base-model", str(base), "--output", str(tmp_path / "made" / "merged")),
        *("--device", "cpu", "--threads", "1"),
        output=tmp_path / "printed",
    )
    while not list((tmp_path / "made").rglob("model.safetensors")) and merging.is_alive():
        time.sleep(0.001)
    os.truncate(expert / name, 5000)
    code = finish(merging)
    assert code == 1, (code, (tmp_path / "printed").read_text())
    assert str(expert / name) in (tmp_path / "printed").read_text().replace("\n", "")
    assert not (tmp_path / "made" / "merged").exists()
