"""Merges during a training come and go with its checkpoints."""

import lightning.pytorch as pl
import optuna
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from neuromerge_hf import NeuroMergeCallback
from neuromerge_hf.callbacks.lightning import NeuroMergeCallback as LightningCallback
from tiny_lightning import Classifier, loader
from tiny_training import classifier, make_trainer, merge_of, merges, train

SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
BEST = {
    **SAVING,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,  # the worst, which is the first
    "eval_strategy": "steps",
    "eval_steps": 1,
}


def test_merges_rotate_with_the_checkpoints(models, tmp_path):
    base, other = models
    callback = NeuroMergeCallback([other], when="save", evaluate=False)
    train(classifier(base), tmp_path, callback, **SAVING)
    assert merges(tmp_path) == {3, 4}
    assert callback.merged_dir == merge_of(tmp_path, 4)


def test_the_merge_of_the_best_checkpoint_is_kept(models, tmp_path):
    base, other = models
    callback = NeuroMergeCallback([other], when="save")
    train(classifier(base), tmp_path, callback, **BEST)
    assert merges(tmp_path) == {1, 4}
    assert callback.merged_dir == merge_of(tmp_path, 1), "training ends with the best model"
    train(classifier(base), tmp_path / "one", callback, **{**BEST, "save_total_limit": 1})
    assert merges(tmp_path / "one") == {1}, "the last checkpoint is deleted when training ends"


def test_without_a_limit_all_merges_are_kept(models, tmp_path):
    base, other = models
    callback = NeuroMergeCallback([other], when="save", evaluate=False)
    train(classifier(base), tmp_path, callback, **{**SAVING, "save_total_limit": None})
    assert merges(tmp_path) == {1, 2, 3, 4}


def test_a_resumed_training_goes_on_rotating(models, tmp_path):
    base, other = models
    for resume, steps in ((False, 2), (True, 4)):
        callback = NeuroMergeCallback([other], when="save", evaluate=False)
        train(classifier(base), tmp_path, callback, resume=resume, max_steps=steps, **SAVING)
    assert merges(tmp_path) == {3, 4}


def test_merges_in_a_chosen_folder_rotate_too_but_what_people_added_stays(models, tmp_path, caplog):
    base, other = models

    class Annotated(NeuroMergeCallback):
        def on_save(self, args, state, control, **kwargs):
            super().on_save(args, state, control, **kwargs)
            if state.global_step == 1:
                (tmp_path / "there" / "step-1" / "thesis.txt").write_text("mine")

    callback = Annotated([other], when="save", output_dir=tmp_path / "there", evaluate=False)
    train(classifier(base), tmp_path / "run", callback, **SAVING)
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"step-1", "step-3", "step-4"}
    assert "thesis.txt" in caplog.text


def test_lightnings_merges_follow_the_checkpoints_that_are_kept(models, tmp_path):
    base, other = models
    keeping = ModelCheckpoint(tmp_path / "kept", monitor="val_loss", mode="max", save_top_k=2, every_n_epochs=1)
    callback = LightningCallback([other], when="save", evaluate=False)
    options = {"max_epochs": 4, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = pl.Trainer(default_root_dir=tmp_path, callbacks=[callback, keeping], **options)
    trainer.fit(Classifier(classifier(base)), loader(), loader())
    kept = {int(path.rpartition("step=")[2].removesuffix(".ckpt")) for path in keeping.best_k_models}
    assert len(kept) == 2
    assert merges(tmp_path) == kept


def test_a_search_does_not_take_what_is_not_a_number_for_the_best(models, tmp_path):
    base, other = models
    callback = NeuroMergeCallback([other])
    changes = {"metric_for_best_model": "score", "greater_is_better": True}
    trainer = make_trainer(None, tmp_path, callback, init=lambda trial: classifier(base), **changes)
    scores = iter([float("nan")] * 3 + [0.5] * 3 + [float("nan")] * 3)  # the trained model, the merged, for the search
    trainer.compute_metrics = lambda prediction: {"score": next(scores)}
    optuna.logging.disable_default_handler()
    space = lambda trial: {"seed": trial.suggest_int("seed", 1, 9)}  # noqa: E731
    trainer.hyperparameter_search(space, n_trials=3, backend="optuna", compute_objective=lambda metrics: 1.0)
    assert callback.merged_dir == tmp_path / "_neuromerge" / "run-1" / "merged"
    assert (callback.merged_dir / "model.safetensors").is_file()


@pytest.mark.parametrize("greater_is_better", [True, False])
def test_a_search_keeps_the_best_merge_alone(models, tmp_path, greater_is_better):
    base, other = models
    callback = NeuroMergeCallback([other])
    changes = {"metric_for_best_model": "loss", "greater_is_better": greater_is_better}
    trainer = make_trainer(None, tmp_path, callback, init=lambda trial: classifier(base), **changes)
    optuna.logging.disable_default_handler()
    values = []

    def objective(metrics):
        values.append(callback.metrics["merged_eval_loss"])
        return metrics["eval_loss"]

    search = {"sampler": optuna.samplers.RandomSampler(seed=0), "compute_objective": objective}
    space = lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)}  # noqa: E731
    trainer.hyperparameter_search(space, n_trials=3, backend="optuna", **search)
    folders = [path.parent for path in tmp_path.rglob("merge_report.json")]
    assert folders == [callback.merged_dir]
    assert callback.metrics["merged_eval_loss"] == (max(values) if greater_is_better else min(values))
    assert len(list((tmp_path / "_neuromerge").iterdir())) == 1, "the trained models of the other trials are gone"
