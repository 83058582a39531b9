"""``neuromerge inspect``, before a merge and after it."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from commands import run
from neuromerge_hf import inspect_models, merge
from neuromerge_hf.folder.report import load_report
from tiny_models import contents, save_llamas


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = save_llamas(tmp_path_factory.mktemp("models"))
    merge([root / "math", root / "code"], root / "merged", base_model=root / "base")
    return root


def words(models: Path, *more: object) -> tuple[object, ...]:
    return "inspect", models / "math", models / "code", "--base-model", models / "base", *more


def test_experts_are_inspected_without_a_merge(models: Path, tmp_path: Path) -> None:
    done = run(*words(models, "--html", tmp_path / "page.html"))
    assert done.exit_code == 0, done.output
    first, _, header, row, *_ = done.stdout.splitlines()
    assert (first, header) == ("What math, code changed of base:", "  expert  kind       change  effective rank")
    assert row.startswith("  math    full ")
    assert "The experts' changes are nearly independent" in done.stdout
    assert f"The page is in {tmp_path / 'page.html'}" in done.stdout
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_a_merge_is_inspected_from_its_report(models: Path, tmp_path: Path) -> None:
    before = contents(models / "merged")
    (models / "merged" / "model.safetensors").rename(tmp_path / "kept")
    done = run("inspect", models / "merged")
    (tmp_path / "kept").rename(models / "merged" / "model.safetensors")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("The merge of math, code into base:\n\n  expert  kind       change  kept\n")
    assert contents(models / "merged") == before


def test_programs_read_json(models: Path, tmp_path: Path) -> None:
    done = run(*words(models, "--json", "--html", tmp_path / "page.html"))
    found = json.loads(done.stdout)
    assert found == inspect_models([models / "math", models / "code"], base_model=models / "base").to_dict()
    assert "The page is in" in done.stderr


def test_what_is_wrong_is_said_before_the_weights_are_read(models: Path, tmp_path: Path) -> None:
    done = run(*words(models, "--html", tmp_path / "missing" / "page.html"))
    assert done.exit_code == 1
    assert "page.html cannot be written: give a file in a folder that exists." in done.stderr
    done = run("inspect", models / "math", models / "nowhere", "--base-model", models / "base")
    assert done.exit_code == 1
    assert "nowhere" in done.stderr
    done = run("inspect", models / "base")
    assert "No base model" in done.stderr


def test_a_merged_model_takes_no_options(models: Path) -> None:
    with pytest.raises(TypeError, match="A merged model has all settings itself: leave dtype out"):
        inspect_models(models / "merged", dtype="float32")


def test_a_report_without_measurements_is_refused(models: Path, tmp_path: Path) -> None:
    merged = Path(shutil.copytree(models / "merged", tmp_path / "merged"))
    dataclasses.replace(load_report(merged), diagnostics=None).save(merged)
    done = run("inspect", merged)
    assert done.exit_code == 1
    assert "merge_report.json has no measurements" in done.stderr
