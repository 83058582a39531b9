"""A merge of files that are written again while it runs ends with an error and leaves nothing."""

import shutil
from pathlib import Path

import pytest

from neuromerge_hf import AutoMergedModel, MergeError, merge
from neuromerge_hf.assembly import assemble
from neuromerge_hf.planning import planner
from rewriting import WAYS, rewrite
from tiny_models import contents, save_fine_tune, save_llama

CPU = {"device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    base = save_llama(root / "base", shard="40KB")
    save_fine_tune(base, root / "math", seed=1)
    save_fine_tune(base, root / "code", seed=2)
    return root


@pytest.fixture
def models(originals, tmp_path):
    return Path(shutil.copytree(originals, tmp_path / "models"))


MOMENTS = {
    "after the plan": (planner, "check_disk"),
    "before a pass": (assemble, "fit_method"),
    "before the last pass": (assemble, "merge_weights"),
    "after the passes": (assemble, "save_heads"),
    "after the hashes": (assemble, "write_card"),
}
"""Functions that are called at a moment of a merge."""


@pytest.fixture
def at_moment(monkeypatch):
    """A function that makes a change at a moment of the next merge."""

    def prepare(moment, change):
        module, name = MOMENTS[moment]
        original = getattr(module, name)

        def changed(*arguments, **keywords):
            monkeypatch.setattr(module, name, original)
            change()
            return original(*arguments, **keywords)

        monkeypatch.setattr(module, name, changed)

    return prepare


def refused(file: Path, output: Path, models: Path) -> None:
    with pytest.raises(MergeError) as caught:
        merge([models / "math", models / "code"], output, base_model=models / "base", overwrite=True, **CPU)
    assert str(caught.value) == (
        f"{file} has changed since it was opened for this merge. "
        "Run it again, and leave the files as they are while it runs."
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", ["base", "code"])
def test_a_file_that_changes_during_a_merge_ends_it(models, tmp_path, at_moment, name, moment, way):
    file = sorted((models / name).glob("*.safetensors"))[-1]
    at_moment(moment, lambda: rewrite(file, way))
    refused(file, tmp_path / "out" / "merged", models)
    assert contents(tmp_path / "out") == {}
    merge([models / "math", models / "code"], tmp_path / "out" / "merged", base_model=models / "base", **CPU)


def test_a_file_that_ends_early_is_said_to_have_changed(models, tmp_path, at_moment):
    file = models / "code" / "model.safetensors"
    at_moment("before a pass", lambda: file.write_bytes(file.read_bytes()[:5_000]))
    refused(file, tmp_path / "out" / "merged", models)


def test_a_file_that_is_removed_is_said_to_have_changed(models, tmp_path, at_moment):
    file = models / "math" / "model.safetensors"
    at_moment("after the passes", file.unlink)
    refused(file, tmp_path / "out" / "merged", models)


def test_an_older_merge_stays_in_its_place(models, tmp_path, at_moment):
    output = tmp_path / "out" / "merged"
    merge([models / "math"], output, base_model=models / "base", **CPU)
    before = contents(output)
    file = models / "math" / "model.safetensors"
    at_moment("before the last pass", lambda: rewrite(file, "in-place"))
    refused(file, output, models)
    assert contents(tmp_path / "out") == {f"merged/{name}": content for name, content in before.items()}


@pytest.mark.parametrize("way", WAYS)
def test_the_cache_keeps_no_merge_of_files_that_changed(models, tmp_path, at_moment, way):
    file = models / "math" / "model.safetensors"
    at_moment("before a pass", lambda: rewrite(file, way))
    with pytest.raises(MergeError, match="has changed since it was opened"):
        AutoMergedModel.from_pretrained([models / "math"], base_model=models / "base", cache_dir=tmp_path / "cache")
    assert contents(tmp_path / "cache") == {}
