"""The hash of a large file is remembered for as long as the file is the same, and no longer."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3

from neuromerge_hf.storage import hashing
from neuromerge_hf.storage.hashing import file_hash, remembered_hash
from neuromerge_hf.storage.paths import user_cache

OLD = 1_600_000_000


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the remembered hashes, in which files of any size and age may have one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hashing, "REMEMBERED", 1)
    monkeypatch.setattr(hashing, "SETTLED", 0)
    return user_cache() / "hashes"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights" * 1000)
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were hashed."""
    found: list[Path] = []

    def counted(path: Path, *arguments: object) -> str:
        found.append(path)
        return file_hash(path, *arguments)

    monkeypatch.setattr(hashing, "file_hash", counted)
    return found


@pytest.mark.parametrize(("algorithm", "direct"), [("blake3", blake3), ("sha256", hashlib.sha256)])
def test_a_hash_is_that_of_the_whole_file(file: Path, algorithm: str, direct: Callable) -> None:
    want = direct(file.read_bytes()).hexdigest()
    assert [file_hash(file, algorithm), remembered_hash(file, algorithm), remembered_hash(file, algorithm)] == 3 * [
        want
    ]


def test_a_file_is_hashed_once(file: Path, reads: list[Path]) -> None:
    assert remembered_hash(file, "blake3") == remembered_hash(file, "blake3")
    assert reads == [file]


def test_each_algorithm_has_a_hash_of_its_own(file: Path) -> None:
    assert remembered_hash(file, "blake3") != remembered_hash(file, "sha256")


def _edited(file: Path) -> None:
    """Other bytes, and the size and the time of the old ones."""
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replaced(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(b"Weights" * 1000)
    other.replace(file)


def _linked(file: Path) -> None:
    target = file.with_name("elsewhere")
    target.write_bytes(b"linked!" * 1000)
    file.unlink()
    file.symlink_to(target)


@pytest.mark.parametrize("change", [_edited, _replaced, _linked])
def test_a_file_that_changed_is_hashed_again(file: Path, change: Callable[[Path], None]) -> None:
    before = remembered_hash(file, "blake3")
    change(file)
    assert remembered_hash(file, "blake3") == blake3(file.read_bytes()).hexdigest() != before


def test_a_link_that_leads_to_another_file_is_hashed_again(tmp_path: Path, file: Path) -> None:
    link, other = tmp_path / "link", tmp_path / "other"
    other.write_bytes(b"others!" * 1000)
    link.symlink_to(file)
    before = remembered_hash(link, "blake3")
    link.unlink()
    link.symlink_to(other)
    assert remembered_hash(link, "blake3") == blake3(other.read_bytes()).hexdigest() != before


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(
    file: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changing(path: Path, *arguments: object) -> str:
        digest = file_hash(path, *arguments)
        _edited(path)
        return digest

    with monkeypatch.context() as patched:
        patched.setattr(hashing, "file_hash", changing)
        remembered_hash(file, "blake3")
    assert not memory.exists()
    assert remembered_hash(file, "blake3") == blake3(file.read_bytes()).hexdigest()


def test_a_file_that_was_just_written_is_not_remembered(
    file: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next change may have the same time, where the file system counts in seconds."""
    monkeypatch.setattr(hashing, "SETTLED", 10)
    remembered_hash(file, "blake3")
    assert not memory.exists()


def test_small_files_are_not_remembered(file: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "REMEMBERED", 7001)
    remembered_hash(file, "blake3")
    assert not memory.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"hash": "0000"}', b"cut"])
def test_a_damaged_memory_is_none(file: Path, memory: Path, content: bytes) -> None:
    want = remembered_hash(file, "blake3")
    (entry,) = memory.iterdir()
    entry.write_bytes(entry.read_bytes()[:-20] if content == b"cut" else content)
    assert remembered_hash(file, "blake3") == want
    assert json.loads(entry.read_text())["hash"] == want


def test_a_memory_that_cannot_be_written_to_is_none(file: Path, memory: Path) -> None:
    memory.parent.mkdir(parents=True)
    memory.write_text("a file where the folder should be")
    assert remembered_hash(file, "blake3") == remembered_hash(file, "blake3")
