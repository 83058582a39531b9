"""The Trainer measures the merged model as it measures the trained one, and tunes the lambdas where it is asked to."""

import json

import pytest

from neuromerge_hf import (
    AutoMergedModel,
    MergeError,
    NeuroIsoConfig,
    NeuroMergeCallback,
    TIESConfig,
    TuningGrid,
)
from neuromerge_hf.folder.recipe import load_recipe
from neuromerge_hf.folder.report import load_report
from tiny_models import load_adapted
from tiny_training import CLASSIFIER, MERGED, TRAINED, Texts, classifier, logged, make_trainer, measure, train
from trainer_callbacks import Recorder


@pytest.mark.parametrize("adapter", [False, True])
def test_the_merged_models_metrics_stand_beside_the_trained_models(models, tmp_path, adapter):
    base, other = models
    recorder = Recorder()
    trainer = train(
        classifier(base, adapter=adapter), tmp_path, NeuroMergeCallback([other]), recorder, eval_strategy="epoch"
    )
    (trained,), (merged,) = logged(trainer, "eval_loss"), logged(trainer, "merged_eval_loss")
    assert merged["step"] == trained["step"] == 4
    expected = measure(AutoMergedModel.from_pretrained(tmp_path / MERGED, head="trained"))
    assert merged["merged_eval_loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert merged["merged_eval_accuracy"] == expected["accuracy"]
    assert merged["merged_eval_loss"] != pytest.approx(trained["eval_loss"], abs=1e-4)
    assert any("merged_eval_loss" in logs for logs in recorder.logs)

    results = {(result.model, result.metric): result.value for result in load_report(tmp_path / MERGED).results}
    assert results == {
        ("merged", "loss"): merged["merged_eval_loss"],
        ("merged", "accuracy"): merged["merged_eval_accuracy"],
        ("trained", "loss"): trained["eval_loss"],
        ("trained", "accuracy"): trained["eval_accuracy"],
    }
    card = (tmp_path / MERGED / "README.md").read_text()
    assert "accuracy" in card
    assert "evaluation set of the training" in card


def test_a_trained_model_that_was_not_evaluated_is_for_comparison(models, tmp_path):
    base, other = models
    trainer = train(classifier(base), tmp_path, NeuroMergeCallback([other]), eval_strategy="no")
    (trained,) = logged(trainer, "eval_loss")
    assert trained["eval_loss"] == pytest.approx(measure(trainer.model)["loss"], abs=1e-6)


def test_several_evaluation_sets_are_measured_each(models, tmp_path):
    base, other = models
    trainer = make_trainer(classifier(base), tmp_path, NeuroMergeCallback([other]))
    trainer.eval_dataset = {"one": Texts(), "two": Texts()}
    trainer.train()
    names = {name for entry in logged(trainer, "merged_") for name in entry}
    assert {"merged_eval_one_loss", "merged_eval_two_loss"} <= names


@pytest.mark.parametrize("evaluate", [True, False])
def test_nothing_is_evaluated_where_it_is_not_wanted_or_there_is_nothing_to_evaluate_on(models, tmp_path, evaluate):
    base, other = models
    trainer = make_trainer(classifier(base), tmp_path, NeuroMergeCallback([other], evaluate=evaluate))
    if evaluate:
        trainer.eval_dataset = None
    trainer.train()
    assert not logged(trainer, "merged_")
    assert not logged(trainer, "eval_")
    assert not load_report(tmp_path / MERGED).results


GRID = TuningGrid(parallel=(0.0, 0.5), orthogonal=(0.6, 1.0), rounds=0)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("metric", [None, "accuracy"])
def test_the_lambdas_are_tuned_by_the_evaluation_of_the_training(models, tmp_path, adapter, metric):
    base, other = models
    changes = {"metric_for_best_model": metric, "eval_strategy": "epoch"}
    recorder = Recorder()
    model = classifier(base, adapter=adapter)
    trainer = train(model, tmp_path, NeuroMergeCallback([other], tune=GRID), recorder, **changes)
    (merged,) = logged(trainer, "merged_eval_loss")
    trials = json.loads((tmp_path / MERGED / "tuning.json").read_text())["trials"]
    scores = [trial["score"] for trial in trials]
    assert len(trials) == 4
    assert len(set(scores)) > 1 or metric, "the candidates are what is evaluated"
    best = max(scores) if metric else min(scores)
    assert merged[f"merged_eval_{metric or 'loss'}"] == pytest.approx(best, abs=1e-6)
    assert load_recipe(tmp_path / MERGED / "recipe.yaml").spec.tuned_on == "evaluation set of the training"
    saved = load_adapted(base, tmp_path / TRAINED, CLASSIFIER) if adapter else classifier(tmp_path / TRAINED)
    assert measure(model) == pytest.approx(measure(saved), abs=1e-6), "the model has its own weights again"
    assert [len(logged(trainer, name)) for name in ("eval_loss", "merged_eval_loss")] == [1, 1]
    if not adapter:
        found = AutoMergedModel.from_pretrained(tmp_path / MERGED, head="trained")
        assert measure(found)["loss"] == pytest.approx(merged["merged_eval_loss"], abs=1e-6)


def test_tuning_that_cannot_be_is_refused_before_training(models, tmp_path):
    base, other = models
    for config in (TIESConfig(), NeuroIsoConfig()):
        with pytest.raises(MergeError, match=f"{type(config).__name__} has not"):
            NeuroMergeCallback([other], config=config, tune=True)
    trainer = make_trainer(classifier(base), tmp_path, NeuroMergeCallback([other], tune=True))
    trainer.eval_dataset = None
    with pytest.raises(MergeError, match="nothing to evaluate"):
        trainer.train()
    callback = NeuroMergeCallback([other], tune=GRID)
    trainer = make_trainer(classifier(base), tmp_path, callback, metric_for_best_model="rhyme")
    with pytest.raises(MergeError, match=r"tuned by eval_rhyme, .* it gives eval_loss, eval_accuracy"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_tensorboard_shows_the_merged_metrics_in_the_file_of_the_run(models, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    base, other = models
    trainer = train(
        classifier(base), tmp_path, NeuroMergeCallback([other]), report_to="tensorboard", eval_strategy="epoch"
    )
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    shown = EventAccumulator(str(events)).Reload()
    tag = next(tag for tag in shown.Tags()["scalars"] if tag.endswith("merged_eval_loss"))
    (point,) = shown.Scalars(tag)
    assert point.step == 4
    assert point.value == pytest.approx(logged(trainer, "merged_eval_loss")[0]["merged_eval_loss"])
