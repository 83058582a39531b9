"""An expert that was trained from another base of the same shape is found by its numbers, with any method."""

import logging
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from changes import change_tensors, says
from families import Relatives
from neuromerge_hf import merge, plan_merge
from neuromerge_hf.config import METHODS, config_class
from neuromerge_hf.engine.base_check import FOREIGN, check_bases
from neuromerge_hf.engine.passes import Passes
from tiny_models import save_adapter, save_fine_tune, save_llama

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two fine-tunes and an adapter of it, and a fine-tune of another base of the same shape."""
    root = tmp_path_factory.mktemp("models")
    for name, seed in {"base": 0, "other": 9}.items():
        save_llama(root / name, seed=seed)
    save_fine_tune(root / "base", root / "math", seed=1)
    save_adapter(root / "base", root / "code", seed=2)
    save_fine_tune(root / "other", root / "foreign", seed=3)
    return root


@pytest.mark.parametrize("method", METHODS)
def test_a_fine_tune_of_another_base_is_named_with_every_method(
    models: Path, tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    experts = [models / name for name in ("math", "foreign", "code")]
    with caplog.at_level(logging.WARNING, "neuromerge_hf"):
        report = merge(experts, tmp_path / "merged", base_model=models / "base", config=config_class(method)())
    (note,) = report.notes
    assert says(note, "foreign is probably no fine-tune of base", "with a minus sign", "times as long", "base_model")
    assert note in caplog.messages
    assert "foreign is probably no" in (tmp_path / "merged" / "README.md").read_text()
    math, foreign, code = report.experts
    assert math.along_base == pytest.approx(0, abs=0.1)
    assert code.along_base is None
    assert code.relative_norm is None
    assert foreign.along_base == pytest.approx(-1, abs=0.1)


def test_the_numbers_are_those_of_the_whole_task_vector_in_a_small_model(models: Path) -> None:
    plan = plan_merge([models / "foreign"], base_model=models / "base")
    (check,) = check_bases(Passes(plan.work, CPU))
    base, expert = (load_file(models / name / "model.safetensors") for name in ("base", "foreign"))
    names = [unit.tensor.name for unit in plan.units if unit.is_neuronal]
    w, tau = (torch.cat([each[name].double().flatten() for name in names]) for each in (base, expert))
    tau = tau - w
    assert check is not None
    assert check.relative_norm == pytest.approx(float(tau.norm() / w.norm()), rel=1e-3)
    assert check.along_base == pytest.approx(float(tau @ w / (w @ w)), abs=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gpt-oss"])
def test_transposed_weights_are_checked_as_well(family: str, tmp_path: Path) -> None:
    relatives = Relatives(family, tmp_path)
    plan = plan_merge([relatives.full(0)], base_model=relatives.base)
    (check,) = check_bases(Passes(plan.work, CPU))
    assert check is not None
    assert not check.is_foreign


def test_the_check_depends_neither_on_blocks_nor_on_threads(models: Path) -> None:
    plan = plan_merge([models / "math", models / "foreign"], base_model=models / "base")
    want = check_bases(Passes(plan.work, CPU))
    for threads, entries in ((1, 1), (3, 200), (2, sys.maxsize)):
        assert check_bases(Passes(plan.work, CPU, threads, block_entries=entries)) == want


def test_weight_decay_is_no_other_base(models: Path, tmp_path: Path) -> None:
    shrunk = save_fine_tune(models / "base", tmp_path / "shrunk", seed=4)
    change_tensors(shrunk / "model.safetensors", lambda tensors: [tensor.mul_(0.9) for tensor in tensors.values()])
    report = merge([shrunk], tmp_path / "merged", base_model=models / "base")
    assert report.notes == []
    assert FOREIGN < report.experts[0].along_base < 0


def test_a_base_of_zeros_is_not_checked(models: Path, tmp_path: Path) -> None:
    zeros = save_llama(tmp_path / "zeros")
    change_tensors(zeros / "model.safetensors", lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    report = merge([models / "math"], tmp_path / "merged", base_model=zeros)
    assert report.experts[0].along_base is None
    assert report.notes == []
