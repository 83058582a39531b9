"""Callbacks average the last models of a training, and merge the average or give it back."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import ModelCheckpoint

from families import assert_same_bits, state
from merged_models import read_tensors
from neuromerge_hf import AverageConfig, MergeError, NeuroMergeCallback, TIESConfig, merge
from neuromerge_hf.callbacks.lightning import NeuroMergeCallback as LightningCallback
from neuromerge_hf.folder.report import load_report
from tiny_lightning import Classifier, loader
from tiny_models import load, load_adapted
from tiny_training import AVERAGED, CLASSIFIER, MERGED, TRAINED, classifier, logged, measure, merge_of, merges, train
from trainer_callbacks import Remover, refused

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}


def mean(folder: Path, base: Path, weights: dict[str | Path, float], adapter: bool) -> dict[str, torch.Tensor]:
    """The weighted mean of saved models by their names, computed directly in float64. Adapters are merged first."""
    total: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if adapter:
            tensors = state(load_adapted(base, folder / name, CLASSIFIER).merge_and_unload())
        else:
            tensors = state(load(folder / name, CLASSIFIER))
        for key, tensor in tensors.items():
            share = weight / sum(weights.values()) * tensor.double()
            total[key] = total[key] + share if key in total else share
    return total


@pytest.mark.parametrize("adapter", [False, True])
def test_without_other_experts_the_average_is_the_result(models, tmp_path, adapter):
    base, _ = models
    callback = NeuroMergeCallback(average_checkpoints=(1, 2, 5))
    trainer = train(classifier(base, adapter=adapter), tmp_path, callback, **SAVING)
    report = load_report(tmp_path / MERGED)
    assert [expert.name for expert in report.experts] == ["checkpoint-2", "checkpoint-3", "trained"]
    assert (report.method, report.settings["weights"]) == ("average", [1, 2, 5])
    averaged = load(tmp_path / MERGED, CLASSIFIER)
    want = mean(tmp_path, base, {"checkpoint-2": 1, "checkpoint-3": 2, TRAINED: 5}, adapter)
    assert state(averaged).keys() == want.keys()
    for name, tensor in state(averaged).items():
        torch.testing.assert_close(tensor.double(), want[name], rtol=1e-5, atol=1e-6)
    [entry] = logged(trainer, "merged_eval_loss")
    assert entry["merged_eval_loss"] == pytest.approx(measure(averaged)["loss"], rel=1e-4)
    assert {result.model for result in report.results} == {"merged", "trained"}
    assert not (tmp_path / AVERAGED).exists()


@pytest.mark.parametrize("adapter", [False, True])
def test_the_average_is_merged_in_place_of_the_trained_model(models, tmp_path, adapter):
    base, other = models
    callback = NeuroMergeCallback([other], average_checkpoints=2, config=TIESConfig())
    trainer = train(classifier(base, adapter=adapter), tmp_path, callback, **SAVING)
    averaged = load(tmp_path / AVERAGED, CLASSIFIER)
    want = mean(tmp_path, base, {"checkpoint-3": 1, TRAINED: 1}, adapter)
    for name, tensor in state(averaged).items():
        torch.testing.assert_close(tensor.double(), want[name], rtol=1e-5, atol=1e-6)
    merge([tmp_path / AVERAGED, other], tmp_path / "expected", base_model=base, config=TIESConfig())
    expected = read_tensors(tmp_path / "expected")
    for name, tensor in read_tensors(tmp_path / MERGED).items():
        assert_same_bits(tensor, expected[name], name)
    [entry] = logged(trainer, "averaged_eval_loss")
    assert entry["averaged_eval_loss"] == pytest.approx(measure(averaged)["loss"], rel=1e-4)
    assert logged(trainer, "merged_eval_loss")
    report = load_report(tmp_path / MERGED)
    assert [expert.name for expert in report.experts] == ["averaged", "other"]
    assert {result.model for result in report.results} == {"merged", "averaged"}


def test_the_average_of_half_precision_models_is_not_rounded_before_the_merge(models, tmp_path):
    base, other = models
    load(base).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    callback = NeuroMergeCallback([other], average_checkpoints=2, evaluate=False)
    train(classifier(tmp_path / "base"), tmp_path / "run", callback, **SAVING)
    averaged, merged = (read_tensors(tmp_path / "run" / name) for name in (AVERAGED, MERGED))
    assert {tensor.dtype for tensor in averaged.values() if tensor.is_floating_point()} == {torch.float32}
    assert {tensor.dtype for tensor in merged.values() if tensor.is_floating_point()} == {torch.bfloat16}


def test_with_fewer_checkpoints_the_last_weights_count(models, tmp_path, caplog):
    base, _ = models
    callback = NeuroMergeCallback(average_checkpoints=(9, 9, 9, 1, 3), when="save", evaluate=False)
    train(classifier(base), tmp_path, callback, **SAVING, max_steps=3)
    assert merges(tmp_path) == {2, 3}
    assert load_report(merge_of(tmp_path, 2)).settings["weights"] == [1, 3]
    assert load_report(merge_of(tmp_path, 3)).settings["weights"] == [9, 1, 3]
    assert "2 models are averaged: the training saved no more checkpoints." in caplog.text


def test_a_failure_says_the_command_that_tries_again(models, tmp_path):
    base, _ = models
    moved = load(base)
    moved.save_pretrained(tmp_path / "base")
    callback = NeuroMergeCallback(average_checkpoints=(0.25, 0.75), evaluate=False)
    with pytest.raises(MergeError) as raised:
        train(classifier(tmp_path / "base"), tmp_path / "run", Remover(tmp_path / "base"), callback, **SAVING)
    command = str(raised.value).splitlines()[-1].split()
    assert command[:2] == ["neuromerge", "merge"]
    assert [Path(word).name for word in command[2:4]] == ["checkpoint-3", "trained"]
    assert "--method average --weights 0.25,0.75" in " ".join(command)
    assert "--merge-heads" in command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average_checkpoints": 1}, "average_checkpoints must be how many"),
        ({"average_checkpoints": True}, "average_checkpoints must be how many"),
        ({"average_checkpoints": (1,)}, "average_checkpoints must be how many"),
        ({"average_checkpoints": (1, -1)}, "average_checkpoints must be numbers above 0"),
        ({"average_checkpoints": "all"}, "average_checkpoints must be numbers above 0"),
        ({"average_checkpoints": 2, "checkpoints": 2}, "Choose one of the two"),
        ({"average_checkpoints": 2, "config": TIESConfig()}, "nothing to merge by TIES-Merging"),
        ({"average_checkpoints": 2, "tune": True}, "which AverageConfig has not"),
        ({"checkpoints": 2, "config": AverageConfig(weights=(1, 2))}, r"average_checkpoints=\(\.\.\.\)"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(options, message):
    with pytest.raises(MergeError, match=message):
        NeuroMergeCallback(**options)


def test_what_cannot_be_averaged_is_refused_before_training(models, tmp_path):
    model = classifier(models[0])
    refused(model, tmp_path / "a", NeuroMergeCallback(average_checkpoints=2), "or leave average_checkpoints out")
    limited = {**SAVING, "save_total_limit": 2}
    callback = NeuroMergeCallback(average_checkpoints=3)
    refused(model, tmp_path / "b", callback, "averages the last 3 models, and this training keeps 2", **limited)
    (tmp_path / "c" / AVERAGED).mkdir(parents=True)
    (tmp_path / "c" / AVERAGED / "mine.txt").write_text("mine")
    callback = NeuroMergeCallback([models[1]], average_checkpoints=2)
    refused(model, tmp_path / "c", callback, "averaged exists and is not empty", **SAVING)


def fit(module: Classifier, folder: Path, *callbacks: Any, **options: Any) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    settings = {"max_epochs": 3, "logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = LightningTrainer(default_root_dir=folder, callbacks=list(callbacks), **(settings | options))
    trainer.fit(module, loader(), loader())


@pytest.mark.parametrize("adapter", [False, True])
def test_lightnings_checkpoints_are_averaged(models, tmp_path, adapter):
    base, other = models
    keeping = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1, every_n_epochs=1, monitor="val_loss")
    callback = LightningCallback([other], average_checkpoints=(1, 3))
    fit(Classifier(classifier(base, adapter=adapter)), tmp_path, callback, keeping)
    want = mean(tmp_path, base, {"_neuromerge/checkpoint-8": 1, TRAINED: 3}, adapter)
    for name, tensor in state(load(tmp_path / AVERAGED, CLASSIFIER)).items():
        torch.testing.assert_close(tensor.double(), want[name], rtol=1e-5, atol=1e-6)
    report = load_report(tmp_path / MERGED)
    assert [expert.name for expert in report.experts] == ["averaged", "other"]
    assert {result.model for result in report.results} == {"merged", "averaged"}
    limited = ModelCheckpoint(tmp_path / "best", save_top_k=1, monitor="val_loss")
    with pytest.raises(MergeError, match="keeps 1 of its checkpoints"):
        fit(Classifier(classifier(base)), tmp_path / "limited", LightningCallback(average_checkpoints=2), limited)
