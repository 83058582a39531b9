"""A merge writes into a new or empty directory that has room for it, or over an earlier merge, and nowhere else."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from changes import says
from neuromerge_hf import MergeError, merge, plan_merge
from neuromerge_hf.folder.directory import atomic_directory
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
    assert says(message, "No space", "575 kB", "1 kB", "Free some")


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
    """An empty folder is replaced by renaming also with overwrite."""

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


@pytest.fixture
def earlier(models, workspace):
    """An earlier merge, and a function that merges again over it."""
    output = workspace / "merged"
    merge([models / "code"], output, base_model=models / "base")

    def again(**options) -> None:
        merge([models / "math"], output, base_model=models / "base", overwrite=True, **options)

    return output, again


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("thesis.tex", "thesis.tex"),
        (".git/objects/ab/cd", ".git/"),
        ("heads/math/notes.txt", "heads/"),
        ("eval.py", "eval.py"),
        ("README.before-push.md", "README.before-push.md"),
        ("model-00001-of-00002.safetensors", "model-00001-of-00002.safetensors"),
    ],
)
def test_what_no_merge_wrote_is_never_deleted_by_overwrite_but_named(earlier, workspace, path, named):
    output, again = earlier
    (output / path).parent.mkdir(parents=True, exist_ok=True)
    (output / path).write_text("mine")
    before = contents(workspace)
    with pytest.raises(MergeError) as caught:
        again()
    assert says(str(caught.value), output, "no merge wrote", named, "Move that away")
    assert contents(workspace) == before
    assert [each.name for each in workspace.iterdir()] == ["merged"]


def test_a_link_in_the_output_is_named_and_what_it_points_to_stays(earlier, tmp_path):
    output, again = earlier
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "text").write_text("mine")
    (output / "data").symlink_to(tmp_path / "data")
    with pytest.raises(MergeError, match=r"no merge wrote: data\."):
        again()
    assert (tmp_path / "data" / "text").read_text() == "mine"


@pytest.mark.parametrize("damage", ["no recipe", "no report", "no list"])
def test_a_folder_that_is_no_merge_is_not_replaced(earlier, damage):
    output, again = earlier
    report = json.loads((output / "merge_report.json").read_text())
    if damage == "no list":
        (output / "merge_report.json").write_text(json.dumps(report | {"files": []}))
    else:
        (output / {"no recipe": "recipe.yaml", "no report": "merge_report.json"}[damage]).unlink()
    before = contents(output)
    with pytest.raises(MergeError) as caught:
        again()
    assert says(str(caught.value), output, "no earlier merge whose report lists its files", "README.md")
    assert contents(output) == before


def test_what_cannot_be_replaced_is_found_with_all_other_problems_before_the_merge(earlier, models):
    output, _ = earlier
    (output / "thesis.tex").write_text("mine")
    with pytest.raises(MergeError) as caught:
        plan_merge([models / "gone"], base_model=models / "base", output_dir=output, overwrite=True)
    assert says(str(caught.value), "2 problems", "thesis.tex", models / "gone")


def test_files_that_appear_while_the_merge_runs_are_kept_too(earlier, workspace):
    output, _ = earlier

    def make():
        with atomic_directory(output, overwrite=True) as folder:
            (folder / "new").write_text("new")
            (output / "thesis.tex").write_text("mine")

    with pytest.raises(MergeError, match=r"thesis\.tex"):
        make()
    assert (output / "thesis.tex").read_text() == "mine"
    assert [each.name for each in workspace.iterdir()] == ["merged"]


def test_files_of_the_system_and_of_killed_processes_do_not_stop_a_replacement(earlier):
    output, again = earlier
    (output / ".DS_Store").write_bytes(b"")
    (output / ".README.md-012345-01234567.tmp").write_bytes(b"half")
    again()
    assert not (output / ".DS_Store").exists()
    assert not list(output.glob(".*.tmp"))


def test_what_people_wrote_into_the_card_is_kept_when_the_merge_is_replaced(earlier):
    output, again = earlier
    card = output / "README.md"
    card.write_text(card.read_text().replace("---\n<!-- neuro", "---\nBefore.\n<!-- neuro", 1) + "\nAfter.\n")
    again()
    text = card.read_text()
    assert "\nBefore.\n<!-- neuromerge" in text
    assert text.endswith("\nAfter.\n")
    assert "`math`" in text
    assert "`code`" not in text


def test_a_card_that_cannot_be_read_is_not_lost(earlier):
    output, again = earlier
    (output / "README.md").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(MergeError, match=r"README\.md would be lost.*UTF-8"):
        again()
    assert (output / "README.md").read_bytes() == "Größe".encode("latin-1")


def test_a_linked_output_is_replaced_where_it_points_to(earlier, models, workspace):
    output, _ = earlier
    link = workspace / "link"
    link.symlink_to(output)
    merge([models / "math"], link, base_model=models / "base", overwrite=True)
    assert link.is_symlink()
    assert "math" in (output / "recipe.yaml").read_text()
    assert sorted(each.name for each in workspace.iterdir()) == ["link", "merged"]


def test_a_replaced_directory_keeps_its_permissions(earlier):
    output, again = earlier
    output.chmod(0o750)
    again()
    assert output.stat().st_mode & 0o7777 == 0o750
