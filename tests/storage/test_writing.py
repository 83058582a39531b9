"""A file is the old one or the new one at every moment, and what killed processes left is found by their locks."""

import errno
import fcntl
import os
import re
import signal

import pytest

from neuromerge_hf import MergeError
from neuromerge_hf.folder.directory import atomic_directory, work_folder
from neuromerge_hf.folder.replaceable import list_files
from neuromerge_hf.storage import temporary
from neuromerge_hf.storage.temporary import remove_leftovers, temporary_path
from neuromerge_hf.storage.writing import copy_file, write_file


def in_child(work) -> int:
    """Call a function in a forked process, and return how it ended: minus the signal that killed it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(monkeypatch, module, name: str, number: int = 1) -> None:
    """Let this process kill itself when it calls a function for the n-th time."""
    calls, function = iter(range(1, 1000)), getattr(module, name)

    def counted(*arguments, **options):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, counted)


@pytest.mark.parametrize("step", ["fchmod", "fsync", "replace"])
def test_a_kill_while_a_file_is_written_keeps_the_old_one_and_the_next_write_cleans_up(tmp_path, monkeypatch, step):
    path = tmp_path / "README.md"
    path.write_text("by hand")
    with monkeypatch.context() as patched:
        kill_at(patched, os, step)
        assert in_child(lambda: write_file(path, "new" * 10_000)) == -signal.SIGKILL
    assert path.read_text() == "by hand"
    assert len(os.listdir(tmp_path)) == 2
    write_file(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["README.md"]


def test_a_file_that_cannot_be_written_stays_and_is_named(tmp_path, monkeypatch):
    path = tmp_path / "README.md"
    path.write_text("by hand")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MergeError, match=re.escape(f"{path} cannot be written: No space left on device.")):
        write_file(path, "new")
    assert path.read_text() == "by hand"
    assert os.listdir(tmp_path) == ["README.md"]


def test_a_written_file_keeps_its_permissions_and_a_new_one_has_the_usual(tmp_path):
    path = tmp_path / "README.md"
    write_file(path, "first")
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    path.chmod(0o640)
    write_file(path, "second")
    assert path.stat().st_mode & 0o7777 == 0o640


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path):
    (tmp_path / "blob").write_text("blob")
    (tmp_path / "file").symlink_to("blob")
    write_file(tmp_path / "file", "new")
    assert (tmp_path / "blob").read_text() == "blob"
    assert not (tmp_path / "file").is_symlink()


def test_a_file_copied_onto_itself_stays(tmp_path):
    (tmp_path / "file").write_text("content")
    (tmp_path / "same").hardlink_to(tmp_path / "file")
    copy_file(tmp_path / "file", tmp_path / "same")
    assert (tmp_path / "file").samefile(tmp_path / "same")
    assert (tmp_path / "same").read_text() == "content"


def make(target, overwrite: bool = False, text: str = "new"):
    with atomic_directory(target, overwrite, list_files) as folder:
        (folder / "file").write_text(text)


@pytest.fixture(params=[True, False], ids=["exchange", "two-renames"])
def exchanges(request, monkeypatch):
    """Whether the system exchanges two folders in one step."""
    if not request.param:
        monkeypatch.setattr("neuromerge_hf.folder.directory._exchange", lambda one, other: False)
    return request.param


def test_a_replaced_directory_is_new_and_alone(tmp_path, exchanges):
    make(tmp_path / "merged", text="old")
    make(tmp_path / "merged", overwrite=True)
    assert list_files(tmp_path) == ["merged/file"]
    assert (tmp_path / "merged" / "file").read_text() == "new"


@pytest.mark.parametrize("step", ["rmtree", "copymode"])
def test_a_kill_during_a_replacement_leaves_the_old_or_the_new_directory(tmp_path, monkeypatch, exchanges, step):
    make(tmp_path / "merged", text="old")
    with monkeypatch.context() as patched:
        kill_at(patched, temporary.shutil, step)
        assert in_child(lambda: make(tmp_path / "merged", overwrite=True)) == -signal.SIGKILL
    assert (tmp_path / "merged" / "file").read_text() == {"rmtree": "new", "copymode": "old"}[step]
    remove_leftovers(tmp_path)
    assert list_files(tmp_path) == ["merged/file"]


def test_a_folder_that_was_between_two_renames_is_restored_with_a_word(tmp_path, monkeypatch, caplog):
    make(tmp_path / "merged", text="old")
    with monkeypatch.context() as patched:
        patched.setattr("neuromerge_hf.folder.directory._exchange", lambda one, other: False)
        kill_at(patched, type(tmp_path), "rename", 2)
        assert in_child(lambda: make(tmp_path / "merged", overwrite=True)) == -signal.SIGKILL
    assert not (tmp_path / "merged").exists()
    make(tmp_path / "other")
    assert (tmp_path / "merged" / "file").read_text() == "old"
    assert f"{tmp_path / 'merged'} is restored" in caplog.text
    assert list_files(tmp_path) == ["merged/file", "other/file"]


def test_folders_of_living_processes_are_not_touched_and_those_of_dead_ones_are_removed_with_a_word(tmp_path, caplog):
    with temporary_path(tmp_path / "merged") as living:
        living.mkdir()
        (living / "half").write_text("half")
        assert in_child(lambda: remove_leftovers(tmp_path)) == 0
        assert (living / "half").exists()

        def die():
            with temporary_path(tmp_path / "merged") as dying:
                dying.mkdir()
                os.kill(os.getpid(), signal.SIGKILL)

        assert in_child(die) == -signal.SIGKILL
        assert len(os.listdir(tmp_path)) == 4
        make(tmp_path / "merged")
        assert living.is_dir()
        assert len(os.listdir(tmp_path)) == 3
        assert re.search(r"\.merged-\w{6}-\w{8} is removed: a process that was killed left it", caplog.text)
    assert os.listdir(tmp_path) == ["merged"]


def test_a_lock_that_another_process_took_before_it_was_held_is_replaced(tmp_path, monkeypatch):
    lock, taken = fcntl.flock, []

    def late(file, how):
        if not taken:
            taken.append(file.name)
            os.unlink(file.name)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with temporary_path(tmp_path / "merged") as path:
        assert f"{path}.lock" != taken[0]
        assert os.listdir(tmp_path) == [f"{path.name}.lock"]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("supported", [True, False])
def test_leftovers_of_other_machines_stay_for_a_day_and_without_locks_forever(tmp_path, monkeypatch, supported):
    """A network file system may keep the locks of each machine apart."""
    folder = tmp_path / ".merged-abcdef-01234567"
    folder.mkdir()
    (folder / "half").write_text("half")
    lock = tmp_path / f"{folder.name}.lock"
    lock.touch()
    monkeypatch.setattr(temporary, "_machine", lambda: "012345")
    if not supported:

        def refuse(file, how):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "flock", refuse)
    make(tmp_path / "merged")
    assert folder.is_dir()
    for path in (folder, folder / "half", lock):
        os.utime(path, (0, 0))
    remove_leftovers(tmp_path)
    assert folder.is_dir() is not supported


def test_a_work_folder_is_found_after_a_kill(tmp_path):
    def die():
        with work_folder(tmp_path) as folder:
            (folder / "large").write_bytes(b"x")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2
    with work_folder(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_files_whose_names_look_like_ours_stay(tmp_path):
    names = [".merged-abcdef-01234567", ".merged-xyz.lock", "merged-abcdef-01234567.lock", ".a.tmp"]
    for name in names:
        (tmp_path / name).write_text("mine")
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(names)


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "No space is left"), (errno.EFBIG, "ulimit -f")])
@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_a_full_disk_is_reported_whatever_library_wrote(tmp_path, number, said, kind):
    def make():
        with atomic_directory(tmp_path / "merged", overwrite=False):
            if kind is OSError:
                raise OSError(number, os.strerror(number))
            raise RuntimeError(f"{os.strerror(number)} (os error {number})")  # as tokenizers and safetensors say

    with pytest.raises(MergeError, match=said) as caught:
        make()
    assert str(tmp_path) in str(caught.value)
    assert os.listdir(tmp_path) == []
