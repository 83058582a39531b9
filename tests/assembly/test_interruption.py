"""A directory that exists is complete, whatever happens while it is made and whoever makes it too."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import processes
from neuromerge_hf import AutoMergedModel, MergeError, merge
from neuromerge_hf.folder.directory import atomic_directory
from neuromerge_hf.storage.temporary import temporary_path
from process_work import load_merged, run_command
from tiny_models import contents, logits, save_bert, save_fine_tune, save_llama


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Large enough that there is a middle of the merge."""
    root = tmp_path_factory.mktemp("models")
    base = save_llama(root / "base", vocab_size=1_000, hidden_size=512, intermediate_size=512)
    for seed in (1, 2, 3):
        save_fine_tune(base, root / f"expert-{seed}", seed=seed)
    return root


def experts(models: Path) -> list[Path]:
    return [models / f"expert-{seed}" for seed in (1, 2, 3)]


@pytest.fixture
def interrupt(models, tmp_path_factory):
    """Merge in a process of its own, and send it a signal as soon as a file appears that fits a pattern.

    An interruption can come anywhere, also between taking a lock and holding it. The process ends; these tests go on.
    """

    def press(output: Path, pattern: str, *options: str, sent: signal.Signals = signal.SIGINT) -> None:
        arguments = [*experts(models), "--base-model", models / "base", "--output", output, "--threads", "1", *options]
        printed = tmp_path_factory.mktemp("printed") / "output.txt"
        process = processes.start(run_command, "merge", *map(str, arguments), output=printed)
        deadline = time.monotonic() + 60
        while not any(output.parent.glob(pattern)) and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        assert any(output.parent.glob(pattern)), printed.read_text()
        os.kill(process.pid, sent)
        assert processes.finish(process) == 128 + sent, printed.read_text()
        assert "Merged" not in printed.read_text()

    return press


@pytest.mark.parametrize(
    "moment", [".merged-*", ".merged-*/model.safetensors"], ids=["while-trimming", "while-writing"]
)
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda sent: sent.name)
def test_an_interrupted_merge_leaves_nothing_behind(tmp_path, interrupt, moment, sent):
    interrupt(tmp_path / "merged", moment, sent=sent)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_replacement_keeps_the_old_directory(models, tmp_path, interrupt):
    merge(experts(models)[:1], tmp_path / "merged", base_model=models / "base")
    before = contents(tmp_path)
    interrupt(tmp_path / "merged", ".merged-*", "--overwrite")
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_failed_replacement_keeps_the_old_directory(tmp_path):
    base = save_llama(tmp_path / "models" / "base")
    expert = save_fine_tune(base, tmp_path / "models" / "expert", seed=1)
    output = tmp_path / "outputs" / "merged"
    merge([expert], output, base_model=base)
    before, threads = contents(output), torch.get_num_threads()
    tensors = load_file(expert / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, expert / "model.safetensors")
    with pytest.raises(MergeError, match="NaN"):
        merge([expert], output, base_model=base, overwrite=True)
    assert contents(output) == before
    assert torch.get_num_threads() == threads
    assert [path.name for path in output.parent.iterdir()] == ["merged"]


def test_a_replacement_leaves_only_the_new_directory(tmp_path):
    base = save_llama(tmp_path / "models" / "base")
    expert = save_fine_tune(base, tmp_path / "models" / "expert", seed=1)
    output = tmp_path / "outputs" / "merged"
    merge([expert], output, base_model=base, max_shard_size="20KB")
    merge([expert], output, base_model=base, overwrite=True)
    assert list(output.glob("model*")) == [output / "model.safetensors"]
    assert [path.name for path in output.parent.iterdir()] == ["merged"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MergeError, OSError])
def test_any_exception_clears_the_directory_in_the_making(tmp_path, error):
    def make():
        with atomic_directory(tmp_path / "new" / "deep" / "merged", overwrite=False) as folder:
            (folder / "half").write_text("half")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        make()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_replaced_stays(tmp_path):
    """Someone filled the output directory while the merge ran."""
    target = tmp_path / "merged"

    def make():
        with atomic_directory(target, overwrite=False) as folder:
            (folder / "ours").write_text("ours")
            target.mkdir()
            (target / "theirs").write_text("theirs")

    with pytest.raises(MergeError, match="not empty"):
        make()
    assert contents(tmp_path) == {"merged/theirs": b"theirs"}


def test_the_directory_has_the_usual_permissions(tmp_path):
    with atomic_directory(tmp_path / "merged", overwrite=False):
        pass
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "merged").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_two_processes_share_one_cache(tmp_path):
    base = save_bert(tmp_path / "base", vocab_size=1_000, hidden_size=512)
    task = {"model_class": "BertForSequenceClassification", "num_labels": 3}
    expert = save_fine_tune(base, tmp_path / "topics", seed=1, **task)
    cache, both = tmp_path / "cache", processes.context.Barrier(2)
    outputs = [tmp_path / "first.txt", tmp_path / "second.txt"]
    racing = [processes.start(load_merged, both, base, expert, cache, output=output) for output in outputs]
    for process, output in zip(racing, outputs, strict=True):
        assert processes.finish(process) == 0, output.read_text()
        assert output.read_text().endswith("BertForSequenceClassification\n")
    assert [path for path in cache.rglob(".*") if path.name.startswith(".")] == []
    assert len([path for path in cache.iterdir() if path.name != "heads"]) == 1
    options = {"base_model": base, "head": "topics"}
    shared = AutoMergedModel.from_pretrained([expert], merge_cache_dir=cache, **options)
    alone = AutoMergedModel.from_pretrained([expert], merge_cache_dir=tmp_path / "other", **options)
    assert torch.equal(logits(shared), logits(alone))


def test_what_a_killed_process_left_is_removed_although_the_merge_is_there(tmp_path):
    base = save_bert(tmp_path / "base")
    expert = save_fine_tune(
        base, tmp_path / "expert", model_class="BertForSequenceClassification", num_labels=2, seed=1
    )
    options = {"base_model": base, "head": "expert", "merge_cache_dir": tmp_path / "cache"}
    AutoMergedModel.from_pretrained([expert], **options)
    with temporary_path(tmp_path / "cache" / "merged") as path:
        lock = path.with_name(path.name + ".lock")
    (head,) = (tmp_path / "cache").rglob("heads/*/expert")
    left = [lock, head.with_name(lock.name)]
    for each in left:
        each.touch()
    AutoMergedModel.from_pretrained([expert], **options)
    assert not any(each.exists() for each in left)
