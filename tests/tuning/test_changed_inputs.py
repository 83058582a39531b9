"""A file that is written again while methods or lambdas are evaluated is noticed: no old header meets new bytes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from changes import change_json
from neuromerge_hf import AverageConfig, MergeError, TIESConfig, TuningGrid, compare_methods, tune_lambdas
from neuromerge_hf.folder.recipe import load_recipe
from neuromerge_hf.storage.hashing import file_hash
from rewriting import WAYS, rewrite
from tiny_models import contents, load, save_llamas

CPU = {"device": "cpu", "threads": 1}
ONE = TuningGrid((0.0,), (1.0,), rounds=0)

CHANGED = (
    "{} has changed since it was opened for this merge. Run it again, and leave the files as they are while it runs."
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llamas(tmp_path_factory.mktemp("originals"))


@pytest.fixture
def models(originals: Path, tmp_path: Path) -> Path:
    """A base and two experts, which the test may change."""
    return Path(shutil.copytree(originals, tmp_path / "models"))


def during(call: int, change: Callable[[], object]) -> Callable[[torch.nn.Module], float]:
    """An evaluation that makes a change during one of its calls."""
    calls: list[int] = []

    def evaluate(model: torch.nn.Module) -> float:
        calls.append(1)
        if len(calls) == call:
            change()
        return float(model.lm_head.weight.abs().max())

    return evaluate


def refused(function: Callable[[], object]) -> str:
    with pytest.raises(MergeError) as caught:
        function()
    return str(caught.value)


# Tuning


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("file", ["base/model.safetensors", "math/model.safetensors", "code/adapter_model.safetensors"])
def test_a_tuned_merge_of_a_file_that_has_changed_is_not_written(models: Path, tmp_path: Path, file, way) -> None:
    evaluate = during(1, lambda: rewrite(models / file, way))
    output = tmp_path / "out" / "merged"
    message = refused(
        lambda: tune_lambdas(
            [models / "math", models / "code"],
            evaluate,
            base_model=models / "base",
            grid=ONE,
            output_dir=output,
            **CPU,
        )
    )
    assert message == CHANGED.format(models / file)
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize("way", WAYS)
def test_the_next_density_is_not_computed_from_a_file_that_has_changed(models: Path, tmp_path: Path, way: str) -> None:
    file = models / "math" / "model.safetensors"
    evaluate = during(1, lambda: rewrite(file, way))
    options = {"densities": [0.5, 1.0], "work_dir": tmp_path / "work", **CPU}
    (tmp_path / "work").mkdir()
    message = refused(
        lambda: tune_lambdas([models / "math"], evaluate, base_model=models / "base", grid=ONE, **options)
    )
    assert message == CHANGED.format(file)
    assert contents(tmp_path / "work") == {}


def test_a_model_that_was_tuned_without_being_written_needs_its_files_no_more(models: Path) -> None:
    before = load(models / "math").lm_head.weight
    evaluate = during(1, lambda: rewrite(models / "math" / "model.safetensors", "renamed", factor=5))
    found = tune_lambdas([models / "math"], evaluate, base_model=models / "base", grid=ONE, **CPU)
    assert found.model.lm_head.weight.norm() < 2 * before.norm()


def test_a_settings_file_that_has_changed_is_noticed_too(models: Path, tmp_path: Path) -> None:
    file = models / "base" / "config.json"
    evaluate = during(1, lambda: change_json(file, rms_norm_eps=0.5))
    message = refused(
        lambda: tune_lambdas(
            [models / "math"], evaluate, base_model=models / "base", grid=ONE, output_dir=tmp_path / "merged", **CPU
        )
    )
    assert message == CHANGED.format(file)


def test_other_files_in_a_models_folder_may_change(models: Path, tmp_path: Path) -> None:
    evaluate = during(1, lambda: (models / "math" / "trainer_state.json").write_text("{}"))
    output = tmp_path / "merged"
    tune_lambdas([models / "math"], evaluate, base_model=models / "base", grid=ONE, output_dir=output, **CPU)
    recorded = yaml.safe_load((output / "recipe.yaml").read_text())["models"][0]["blake3"]["model.safetensors"]
    assert recorded == file_hash(models / "math" / "model.safetensors", "blake3")
    load_recipe(output / "recipe.yaml").check_files()


# Comparing


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_files_that_change_while_methods_are_compared_are_refused(models: Path, tmp_path: Path, call, way) -> None:
    file = models / "math" / "model.safetensors"
    evaluate = during(call, lambda: rewrite(file, way))
    message = refused(
        lambda: compare_methods(
            [models / "math", models / "code"],
            evaluate,
            base_model=models / "base",
            methods=[AverageConfig(), TIESConfig(density=1, exclude=("lm_head*",))],
            work_dir=tmp_path,
            output_dir=tmp_path / "table",
            **CPU,
        )
    )
    assert message == CHANGED.format(file)
    assert {path.name for path in tmp_path.iterdir()} == {"models"}
