"""Headers of safetensors files are read exactly as the safetensors library reads them, here and by range."""

import json
import os
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headers import Mutant, defect, library_tensors, mutate_bytes, mutate_entries, mutate_entry, range_server
from neuromerge_hf import MergeError
from neuromerge_hf.storage.formats import open_safetensors
from neuromerge_hf.storage.remote import open_remote

ONE = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
TWO = '{"dtype":"F32","shape":[1],"data_offsets":[4,8]}'


def file_of(folder: Path, header: str | bytes, data: int = 8) -> Path:
    """A file with this header and so many bytes of data."""
    encoded = header if isinstance(header, bytes) else header.encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(range(data)))
    return path


REFUSED = {
    "overlapping offsets": f'{{"a":{ONE},"b":{TWO.replace("[4,8]", "[2,6]")}}}',
    "aliased offsets": f'{{"a":{ONE},"b":{ONE}}}',
    "negative offsets": f'{{"a":{ONE.replace("[0,4]", "[-4,0]")},"b":{TWO}}}',
    "a hole": f'{{"b":{TWO}}}',
    "trailing bytes": f'{{"a":{ONE}}}',
    "missing bytes": f'{{"a":{ONE},"b":{TWO},"c":{TWO.replace("[4,8]", "[8,12]")}}}',
    "a field twice": f'{{"a":{ONE[:-1]},"shape":[1]}},"b":{TWO}}}',
    "floats as offsets": f'{{"a":{ONE.replace("[0,4]", "[0.0,4.0]")},"b":{TWO}}}',
    "huge sizes": f'{{"a":{ONE.replace("[1]", "[18446744073709551617]")},"b":{TWO}}}',
    "a size of a wrong type": f'{{"a":{ONE.replace("[1]", "[true]")},"b":{TWO}}}',
    "a size too large for torch": f'{{"z":{ONE.replace("[1]", "[9223372036854775808,0]").replace("[0,4]", "[0,0]")}}}',
    "metadata of numbers": f'{{"__metadata__":{{"step":3}},"a":{ONE},"b":{TWO}}}',
    "metadata twice": f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{ONE},"b":{TWO}}}',
    "half a character": f'{{"\\ud800":{ONE},"b":{TWO}}}',
    "not a number": f'{{"a":{ONE[:-1]},"x":NaN}},"b":{TWO}}}',
    "deep nesting": f'{{"a":{ONE[:-1]},"x":{"[" * 200}{"]" * 200}}},"b":{TWO}}}',
    "deeper nesting": f'{{"a":{ONE[:-1]},"x":{"[" * 90_000}{"]" * 90_000}}},"b":{TWO}}}',
    "UTF-16": f'{{"a":{ONE},"b":{TWO}}}'.encode("utf-16"),
    "a byte order mark": f'{{"a":{ONE},"b":{TWO}}}'.encode("utf-8-sig"),
    "zeros after the header": f'{{"a":{ONE},"b":{TWO}}}'.encode() + bytes(2),
}
"""Headers of files with eight bytes of data (none where the only tensor is empty)."""


@pytest.mark.parametrize("what", REFUSED)
def test_a_file_with_a_header_that_the_library_refuses_is_refused(what: str, tmp_path: Path) -> None:
    path = file_of(tmp_path, REFUSED[what], data=0 if what == "a size too large for torch" else 8)
    assert library_tensors(path) is None
    with pytest.raises(MergeError, match=str(path)):
        open_safetensors(path)
    assert defect(path, by_range=True) is None


def test_a_valid_file_is_read_whatever_the_order_of_its_header(tmp_path: Path) -> None:
    for header in (f'{{"a":{ONE},"b":{TWO}}}', f' {{"b":{TWO},"__metadata__":null,"a":{ONE}}}\n\t '):
        path = file_of(tmp_path, header)
        assert library_tensors(path) is not None
        assert defect(path, by_range=True) is None


def test_a_dtype_that_torch_lacks_is_named(tmp_path: Path) -> None:
    path = file_of(tmp_path, '{"a":{"dtype":"F4","shape":[16],"data_offsets":[0,8]}}')
    with pytest.raises(MergeError, match=f"a in {path} has the dtype F4"):
        open_safetensors(path)


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(MergeError, match=f"{path} cannot be read"):
            open_safetensors(path)


def test_the_header_of_a_large_file_is_checked_without_space_for_the_file(tmp_path: Path) -> None:
    size = 1 << 40
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    server = range_server()
    path = file_of(tmp_path, json.dumps({"a": entry}), data=0)
    server.content = path.read_bytes()
    total = len(server.content) + size
    assert open_remote(path, server.url, total, token=False)["a"].shape == (size,)
    for wrong in (total - 1, total + 1):
        with pytest.raises(MergeError, match=str(path)):
            open_remote(path, server.url, wrong, token=False)


@given(seed=st.integers(0, 2**32), entries=st.integers(0, 3), others=st.integers(0, 2), damages=st.integers(0, 2))
@settings(max_examples=500, deadline=None)
def test_mutated_files_are_accepted_or_refused_as_by_the_library(
    seed: int, entries: int, others: int, damages: int
) -> None:
    rng = random.Random(seed)
    mutant = Mutant.valid(rng)
    for mutate, times in ((mutate_entry, entries), (mutate_entries, others)):
        for _ in range(times):
            if any(name != "__metadata__" for name, _ in mutant.header):
                mutate(mutant, rng)
    content = mutant.bytes()
    for _ in range(damages):
        content = mutate_bytes(content, rng)[0] if len(content) > 8 else content
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(content)
        assert defect(path, by_range=seed % 8 == 0) is None


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=200, deadline=None)
def test_bytes_that_are_no_safetensors_file_are_refused(content: bytes, has_length: bool) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(len(content).to_bytes(8, "little") * has_length + content)
        assert defect(path) is None


def test_a_file_that_becomes_shorter_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    path = file_of(tmp_path, f'{{"a":{ONE},"b":{TWO}}}')
    tensors = open_safetensors(path)
    os.truncate(path, path.stat().st_size - 2)
    with pytest.raises(MergeError, match=f"{path} ended early"):
        tensors["b"].read(0, 1, torch.empty(1))
