"""NeuroMergeCallback merges what the Trainer of Lightning trained, and changes nothing of the training."""

import csv
import importlib
import inspect
import json
import shutil
import sys

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from accelerate import PartialState
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from transformers import AutoConfig

import neuromerge_hf.callbacks
from neuromerge_hf import AutoMergedModel, MergeError, NeuroMergeCallback, TuningGrid, merge
from neuromerge_hf.callbacks.common.sharded import is_sharded
from neuromerge_hf.callbacks.lightning import NeuroMergeCallback as LightningCallback
from neuromerge_hf.folder.recipe import load_recipe
from neuromerge_hf.folder.report import load_report
from tiny_lightning import Classifier, loader, module_class
from tiny_models import contents, load_adapted
from tiny_training import CLASSIFIER, MERGED, TRAINED, classifier, measure, merges


def fit(module, folder, *callbacks, package=pl, **options):
    """Train a module; `options` go to the trainer."""
    settings = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "default_root_dir": folder,
        "logger": package.loggers.CSVLogger(folder, name="logs", version=""),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "log_every_n_steps": 1,
    }
    trainer = package.Trainer(**(settings | options), callbacks=list(callbacks))
    trainer.fit(module, loader(), loader())
    return trainer


def rows(folder, column):
    """The logged values of a column, by the step."""
    table = csv.DictReader((folder / "logs" / "metrics.csv").read_text().splitlines())
    return {int(row["step"]): float(row[column]) for row in table if row.get(column)}


@pytest.mark.parametrize("package", [pl, pytorch_lightning], ids=lambda package: package.__name__)
@pytest.mark.parametrize("adapter", [False, True])
def test_what_was_trained_is_merged_and_measured(models, tmp_path, package, adapter):
    base, other = models
    module = module_class(package)(classifier(base, adapter=adapter))
    run = tmp_path / "run"
    callback = LightningCallback([other])
    trainer = fit(module, run, callback, package=package)
    merge([run / TRAINED, other], tmp_path / "expected", base_model=base)
    found, expected = contents(run / MERGED), contents(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert found["model.safetensors"] == expected["model.safetensors"]

    assert AutoConfig.from_pretrained(run / MERGED / "heads" / "trained").architectures == [CLASSIFIER]
    saved = load_adapted(base, run / TRAINED, CLASSIFIER) if adapter else classifier(run / TRAINED)
    trained = measure(saved)
    assert measure(module.network) == pytest.approx(trained, abs=1e-6), "the model has its own weights again"
    measured = measure(AutoMergedModel.from_pretrained(run / MERGED, head="trained"))
    assert rows(run, "merged_val_loss") == {4: pytest.approx(measured["loss"], abs=1e-5)}
    assert rows(run, "merged_val_accuracy") == {4: measured["accuracy"]}
    results = {(result.model, result.metric): result.value for result in load_report(run / MERGED).results}
    assert results["trained", "val_loss"] == pytest.approx(trained["loss"], abs=1e-5)
    assert results["merged", "val_accuracy"] == measured["accuracy"]
    assert set(trainer.callback_metrics) == {"train_loss", *callback.metrics}
    assert callback.metrics["merged_val_loss"] == trainer.callback_metrics["merged_val_loss"]


def test_the_device_of_the_training_is_not_chosen_by_the_merge(models, tmp_path, monkeypatch):
    # accelerate would make a device the current one of the process, which may not be the device of Lightning.
    monkeypatch.setattr(PartialState, "_shared_state", {})
    seen = []

    class Look(pl.Callback):
        def on_train_batch_start(self, *arguments):
            seen.append(dict(PartialState._shared_state))

    base, other = models
    fit(module_class(pl)(classifier(base)), tmp_path / "run", LightningCallback([other]), Look())
    assert seen
    assert not any(seen)


def test_the_arguments_are_those_of_the_callback_for_transformers():
    ours, theirs = (
        inspect.signature(callback).parameters.values() for callback in (LightningCallback, NeuroMergeCallback)
    )
    positional = [parameter for parameter in ours if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert positional == [parameter for parameter in theirs if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]


@pytest.mark.parametrize(("when", "interval"), [("epoch", 1.0), ("save", 0.5)])
def test_merging_in_the_middle_changes_nothing_of_the_training(models, tmp_path, when, interval):
    base, other = models

    def run(folder, *callbacks):
        module = Classifier(classifier(base))
        for child in module.modules():
            if isinstance(child, torch.nn.Dropout):
                child.p = 0.1
        pl.seed_everything(7, verbose=False)
        checkpoint = ModelCheckpoint(folder / "checkpoints", monitor="val_loss", save_top_k=-1)
        stopping = EarlyStopping("val_loss", patience=9)
        trainer = fit(
            module,
            folder,
            *callbacks,
            stopping,
            checkpoint,
            max_epochs=2,
            limit_train_batches=2,
            val_check_interval=interval,
        )
        return trainer, module, checkpoint, stopping

    plain, expected, *watching = run(tmp_path / "plain")
    trainer, found, *watched = run(tmp_path / "run", LightningCallback([other], when=when))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert trainer.callback_metrics.items() >= plain.callback_metrics.items()
    assert rows(tmp_path / "run", "val_loss") == rows(tmp_path / "plain", "val_loss")
    assert rows(tmp_path / "run", "train_loss") == rows(tmp_path / "plain", "train_loss")
    assert [module.training for module in found.modules()] == [module.training for module in expected.modules()]
    assert watched[0].best_model_score == watching[0].best_model_score
    assert watched[1].best_score == watching[1].best_score
    assert trainer.fit_loop.state_dict() == plain.fit_loop.state_dict()
    steps = {"epoch": [2, 4], "save": [1, 2, 3, 4]}[when]
    assert sorted(rows(tmp_path / "run", "merged_val_loss")) == steps
    assert merges(tmp_path / "run") == set(steps)


def test_the_best_weights_are_merged_if_asked_for(models, tmp_path):
    base, other = models
    module = Classifier(classifier(base))
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", monitor="val_loss", mode="max", save_top_k=1)
    fit(module, tmp_path, LightningCallback([other], best_weights=True), checkpoint, max_epochs=3)
    best = torch.load(checkpoint.best_model_path)["state_dict"]
    trained = classifier(tmp_path / TRAINED).state_dict()
    assert all(torch.equal(trained[name.removeprefix("network.")], best[name]) for name in best)
    assert not torch.equal(best["network.classifier.weight"], module.state_dict()["network.classifier.weight"])
    results = {(result.model, result.metric): result.value for result in load_report(tmp_path / MERGED).results}
    assert results["trained", "val_loss"] == pytest.approx(checkpoint.best_model_score.item(), abs=1e-6)


def test_without_best_weights_the_last_are_merged_with_a_warning(models, tmp_path, caplog):
    base, other = models
    checkpoint = ModelCheckpoint(tmp_path / "kept", monitor="val_loss", every_n_epochs=5)
    fit(
        Classifier(classifier(base)),
        tmp_path,
        LightningCallback([other], best_weights=True, evaluate=False),
        checkpoint,
    )
    assert "the last weights are merged" in caplog.text


def test_saving_that_never_happens_cannot_be_followed_by_a_merge(models, tmp_path):
    base, other = models
    with pytest.raises(MergeError, match="saves no checkpoints"):
        fit(Classifier(classifier(base)), tmp_path, LightningCallback([other], when="save"))


@pytest.mark.parametrize(("checkpoints", "expected"), [("all", [4, 8]), (1, [8])])
def test_checkpoints_of_the_run_are_merged_too(models, tmp_path, checkpoints, expected):
    base, other = models
    callback = LightningCallback([other], checkpoints=checkpoints, evaluate=False)
    keeping = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1, every_n_epochs=1, monitor="val_loss")
    fit(Classifier(classifier(base, adapter=True)), tmp_path, callback, keeping, max_epochs=3)
    names = [expert.name for expert in load_report(tmp_path / MERGED).experts]
    assert names == ["trained", *(f"checkpoint-{step}" for step in expected), "other"]


def test_one_of_several_models_is_named(models, tmp_path):
    base, other = models
    module = Classifier(classifier(base))
    module.teacher = torch.nn.ModuleDict({"old": classifier(base).train()})
    with pytest.raises(MergeError, match=r"models network, teacher\.old. Say which one.*attribute='network'"):
        fit(module, tmp_path, LightningCallback([other]))
    fit(module, tmp_path, LightningCallback([other], attribute="network"))
    assert rows(tmp_path, "merged_val_loss")
    with pytest.raises(MergeError, match="has no model of transformers"):
        fit(Classifier(torch.nn.Linear(2, 2)), tmp_path / "none", LightningCallback([other]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's compiler uses it itself
def test_a_compiled_model_is_merged(models, tmp_path):
    base, other = models
    module = Classifier(torch.compile(classifier(base)))
    with torch.compiler.set_stance("force_eager"):  # what matters here are its names, and compiling takes time
        fit(module, tmp_path, LightningCallback([other]))
        assert measure(classifier(tmp_path / TRAINED)) == pytest.approx(measure(module.network), abs=1e-6)
    assert rows(tmp_path, "merged_val_loss")


def test_a_module_without_validation_is_merged_unmeasured(models, tmp_path):
    base, other = models
    module = Classifier(classifier(base))
    fit(module, tmp_path, LightningCallback([other]), limit_val_batches=0)
    assert not rows(tmp_path, "merged_val_loss")
    assert not load_report(tmp_path / MERGED).results


def test_what_is_wrong_is_said_before_training(models, tmp_path):
    base, other = models
    module = Classifier(classifier(base))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(MergeError, match="absent"):
        fit(module, tmp_path, LightningCallback([other, tmp_path / "absent"]))
    with pytest.raises(MergeError, match="ModelCheckpoint"):
        fit(module, tmp_path, LightningCallback([other], best_weights=True))
    with pytest.raises(MergeError, match="saves no checkpoints"):
        fit(module, tmp_path, LightningCallback([other], checkpoints="all"))
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_merge_that_fails_names_the_trained_model_and_the_command(models, tmp_path):
    base, other = models
    mine = tmp_path / "mine"
    shutil.copytree(other, mine)

    class Removing(Classifier):
        def on_train_epoch_end(self):
            shutil.rmtree(mine)

    trained = tmp_path / TRAINED
    with pytest.raises(MergeError, match=rf"(?s)saved in {trained}.*neuromerge merge {trained}"):
        fit(Removing(classifier(base)), tmp_path, LightningCallback([mine]))
    assert (trained / "model.safetensors").is_file()


@pytest.mark.parametrize("monitor", [None, "val_accuracy"])
def test_the_lambdas_are_tuned_by_the_validation_of_the_training(models, tmp_path, monitor):
    base, other = models
    module = Classifier(classifier(base))
    monitors = [ModelCheckpoint(tmp_path / "kept", monitor=monitor, mode="max")] if monitor else []
    grid = TuningGrid(parallel=(0.0, 0.5), orthogonal=(0.6, 1.0), rounds=0)
    fit(module, tmp_path, LightningCallback([other], tune=grid), *monitors)
    trials = json.loads((tmp_path / MERGED / "tuning.json").read_text())["trials"]
    scores = [trial["score"] for trial in trials]
    assert len(trials) == 4
    column = f"merged_{monitor or 'val_loss'}"
    assert rows(tmp_path, column) == {4: pytest.approx(max(scores) if monitor else min(scores), abs=1e-5)}
    assert load_recipe(tmp_path / MERGED / "recipe.yaml").spec.tuned_on == "evaluation set of the training"
    saved = measure(classifier(tmp_path / TRAINED))
    assert measure(module.network) == pytest.approx(saved, abs=1e-6), "the model has its own weights again"


def test_a_metric_that_the_validation_does_not_give_is_refused_before_training(models, tmp_path):
    base, other = models
    module = Classifier(classifier(base))
    monitor = ModelCheckpoint(tmp_path / "kept", monitor="val_rhyme")
    with pytest.raises(MergeError, match=r"tuned by val_rhyme, .* it gives .*val_loss"):
        fit(module, tmp_path, LightningCallback([other], tune=True), monitor)
    assert module.trainer.global_step == 0


def test_strategies_that_cannot_give_whole_weights_are_refused():
    with pytest.raises(MergeError, match='state_dict_type="full"'):
        is_sharded(pl.strategies.FSDPStrategy(state_dict_type="sharded"))
    assert is_sharded(pl.strategies.FSDPStrategy(state_dict_type="full"))
    with pytest.raises(MergeError, match="save_distributed_checkpoint=False"):
        is_sharded(pl.strategies.ModelParallelStrategy())
    assert not is_sharded(pl.strategies.DDPStrategy())


def test_either_of_lightnings_packages_will_do(monkeypatch):
    ours = "neuromerge_hf.callbacks.lightning"
    monkeypatch.setattr(neuromerge_hf.callbacks, "lightning", None)  # the import below sets another
    for name in list(sys.modules):
        if name.startswith(ours) or name.partition(".")[0] == "lightning":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)  # as if it were not installed
    assert issubclass(importlib.import_module(ours).NeuroMergeCallback, pytorch_lightning.Callback)

    for name in list(sys.modules):
        if name.startswith(ours) or name.partition(".")[0] == "pytorch_lightning":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    with pytest.raises(ImportError, match="pip install lightning"):
        importlib.import_module(ours)
