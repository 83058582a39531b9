"""Finished merges are listed and deleted, on the command line."""

import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from commands import run
from neuromerge_hf import AutoMergedModel, MergeError
from neuromerge_hf.cli import app
from neuromerge_hf.folder.merge_cache import delete_merges, list_merges
from tiny_models import save_bert, save_llamas

CPU = {"device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llamas(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def two_merges(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    for number, names in enumerate((["math"], ["math", "code"])):
        experts = [models / name for name in names]
        AutoMergedModel.from_pretrained(experts, base_model=models / "base", merge_cache_dir=cache, **CPU)
        newest = max(cache.iterdir(), key=lambda path: path.stat().st_mtime)
        os.utime(newest, (1000 + number, 1000 + number))
    return cache


@pytest.fixture
def cache(two_merges: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_merges, tmp_path / "cache"))


def test_merges_are_listed_the_newest_first(cache: Path) -> None:
    (cache / "hashes").mkdir()
    found = list_merges(cache)
    assert [each.description for each in found] == ["math, code into base, neuro_iso", "math into base, neuro_iso"]
    for each in found:
        assert each.size == sum(path.stat().st_size for path in each.folder.rglob("*") if path.is_file())
    done = run("cache", "ls", "--merge-cache-dir", cache)
    assert done.exit_code == 0, done.output
    assert [line.split()[0] for line in done.stdout.splitlines()[:3]] == ["id", found[0].id[:12], found[1].id[:12]]
    listed = json.loads(run("cache", "ls", "--merge-cache-dir", cache, "--json").stdout)
    assert [each["id"] for each in listed] == [each.id for each in found]


def test_an_empty_cache_and_none_are_said_to_be_empty(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        assert run("cache", "ls", "--merge-cache-dir", folder).stdout == f"There are no merges in {folder}\n"
        assert run("cache", "rm", "--all", "--merge-cache-dir", folder).stdout == "Deleted 0 of 0 merges, 0 B\n"


def test_a_merge_is_deleted_by_the_beginning_of_its_id(cache: Path) -> None:
    newer, older = list_merges(cache)
    done = run("cache", "rm", older.id[:12], "--yes", "--merge-cache-dir", cache)
    assert done.exit_code == 0, done.output
    assert "Deleted 1 of 2 merges" in done.stdout
    assert [each.id for each in list_merges(cache)] == [newer.id]
    assert list(cache.iterdir()) == [newer.folder]


def test_all_are_deleted_after_a_question(cache: Path) -> None:
    words = ["cache", "rm", "--all", "--merge-cache-dir", str(cache)]
    declined = CliRunner().invoke(app, words, input="n\n")
    assert (declined.exit_code, len(list_merges(cache))) == (1, 2)
    assert CliRunner().invoke(app, words, input="y\n").exit_code == 0
    assert list(cache.iterdir()) == []


def test_what_names_no_single_merge_deletes_nothing(cache: Path) -> None:
    known = list_merges(cache)[0].id
    for given, count in (("x", "no merge"), ("", "2 merges"), ("../cache", "no merge")):
        with pytest.raises(MergeError, match=f"names {count}"):
            delete_merges(cache, [known, given])
    assert len(list_merges(cache)) == 2
    assert run("cache", "rm", "--merge-cache-dir", cache).exit_code == 2
    assert run("cache", "rm", known, "--all", "--merge-cache-dir", cache).exit_code == 2


def test_a_damaged_merge_is_listed_and_can_be_deleted(cache: Path) -> None:
    folder = list_merges(cache)[0].folder
    (folder / "merge_report.json").write_text("{")
    assert list_merges(cache)[0].description.startswith("damaged: ")
    delete_merges(cache, [folder.name])
    assert not folder.exists()


def test_links_to_a_deleted_merge_go_with_it(tmp_path: Path) -> None:
    base = save_bert(tmp_path / "base")
    expert = save_bert(tmp_path / "expert", "BertForSequenceClassification", num_labels=3)
    cache = tmp_path / "cache"
    AutoMergedModel.from_pretrained([expert], base_model=base, head="expert", merge_cache_dir=cache, **CPU)
    (links,) = cache.glob("heads/*/*")
    delete_merges(cache, [list_merges(cache)[0].id])
    assert not links.exists()


def test_what_an_interrupted_deletion_left_is_no_merge_and_goes_next_time(cache: Path) -> None:
    first, second = list_merges(cache)
    first.folder.rename(cache / f".deleted-{first.id}")
    shutil.copytree(second.folder, cache / f".deleted-{second.id}")
    assert [each.id for each in list_merges(cache)] == [second.id]
    delete_merges(cache, [second.id])
    assert list(cache.iterdir()) == []
