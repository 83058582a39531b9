"""A merge writes nowhere but into a new or empty directory that has room for it, and leaves nothing if it fails."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from changes import says
from neuromerge_hf import MergeError, merge
from tiny_models import contents, load, save_fine_tune


def test_an_output_directory_with_content_is_refused_and_untouched(models, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    with pytest.raises(MergeError) as caught:
        merge([models / "math"], tmp_path / "merged", base_model=models / "base")
    assert says(str(caught.value), tmp_path / "merged", "not empty", "overwrite=True", "--overwrite")
    assert contents(tmp_path) == {"merged/notes.txt": b"mine"}


def test_an_output_that_is_a_file_is_refused(models, tmp_path):
    (tmp_path / "merged").write_text("mine")
    with pytest.raises(MergeError) as caught:
        merge([models / "math"], tmp_path / "merged", base_model=models / "base", overwrite=True)
    assert says(str(caught.value), tmp_path / "merged", "is a file")
    assert contents(tmp_path) == {"merged": b"mine"}


@pytest.mark.parametrize("output", ["base", "math", "base/../math", "."])
def test_an_output_that_would_replace_an_input_is_refused(copied, tmp_path, output):
    base, expert = copied("base"), copied("math")
    before = contents(tmp_path)
    with pytest.raises(MergeError) as caught:
        merge([expert], tmp_path / output, base_model=base, overwrite=True)
    assert says(str(caught.value), "output directory", tmp_path / output)
    assert contents(tmp_path) == before


def test_an_empty_output_directory_is_used(models, workspace):
    (workspace / "merged").mkdir()
    merge([models / "math"], workspace / "merged", base_model=models / "base")
    assert [path.name for path in workspace.iterdir()] == ["merged"]
    load(workspace / "merged")


def test_the_current_directory_is_used_if_it_is_empty(models, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    merge([models / "math"], ".", base_model=models / "base")
    load(workspace)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(models, refused, monkeypatch):
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    message = refused([models / "math"], planned=False, base_model=models / "base")
    assert says(message, "No space", "577 kB", "1 kB", "Free some")


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system with a fixed number of bytes, and unmounts it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"needs the right to mount a small file system: {done.stderr}")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", folder], check=True)


def test_a_small_disk_is_refused_before_anything_is_written(models, small_disk):
    disk = small_disk(60_000)
    with pytest.raises(MergeError, match=r"No space"):
        merge([models / "math"], disk / "merged", base_model=models / "base")
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("heads", [False, True], ids=["weights", "heads"])
def test_a_disk_that_fills_up_meanwhile_is_reported_and_cleaned(models, small_disk, tmp_path, monkeypatch, heads):
    base, expert = models / "base", models / "math"
    if heads:  # the merged weights find room, but the expert's head does not
        base = models / "bert"
        expert = save_fine_tune(
            base, tmp_path / "tagger", seed=1, model_class="BertForTokenClassification", num_labels=900
        )
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**9))  # there was room a moment ago
    disk = small_disk(73_728 if heads else 40_960)
    with pytest.raises(MergeError) as caught:
        merge([expert], disk / "merged", base_model=base)
    assert says(str(caught.value), "No space is left", disk)
    assert list(disk.iterdir()) == []


def test_a_mount_point_is_refused_before_anything_is_read(models, small_disk):
    disk = small_disk(10**6)
    with pytest.raises(MergeError) as caught:
        merge([models / "math"], disk, base_model=models / "gone")
    assert says(str(caught.value), disk, "mount point", "inside it")
    merge([models / "math"], disk / "merged", base_model=models / "base")
    assert [path.name for path in disk.iterdir()] == ["merged"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_cannot_be_put_in_its_place_is_reported(models, workspace, monkeypatch, overwrite):
    def refuse(path, target):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path, None, target)

    (workspace / "merged").mkdir()
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(MergeError) as caught:
        merge([models / "math"], workspace / "merged", base_model=models / "base", overwrite=overwrite)
    assert says(str(caught.value), workspace / "merged", "cross-device", "Choose another")
    assert [path.name for path in workspace.iterdir()] == ["merged"]


def test_a_place_that_may_not_be_written_is_refused(models):
    with pytest.raises(MergeError) as caught:
        merge([models / "math"], "/proc/merged", base_model=models / "base")
    assert says(str(caught.value), "/proc/merged", "cannot be written")
