"""NeuroMergeCallback in the Trainer of transformers."""

import json
import pickle
import random
import shlex
import shutil
from functools import partial

import numpy as np
import optuna
import pytest
import torch
from huggingface_hub import HfApi
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    TrainerCallback,
    TrainerState,
)
from typer.testing import CliRunner

from neuromerge_hf import (
    AutoMergedModel,
    DARETIESConfig,
    MergeError,
    NeuroMergeCallback,
    NeuroMergingConfig,
    TIESConfig,
    TuningGrid,
    merge,
)
from neuromerge_hf.callbacks.common import publish
from neuromerge_hf.callbacks.common.sharded import check_zero
from neuromerge_hf.callbacks.common.weights import _check_fit
from neuromerge_hf.cli import app
from neuromerge_hf.folder.recipe import load_recipe
from neuromerge_hf.folder.report import load_report
from tiny_models import contents, load_adapted, save_bert, save_fine_tune
from tiny_training import CLASSIFIER, Texts, classifier, logged, make_trainer, measure, train


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and another expert of it."""
    folder = tmp_path_factory.mktemp("models")
    base = save_bert(folder / "base")
    return base, save_fine_tune(base, folder / "other", seed=1)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost tiny models more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Recorder(TrainerCallback):
    """Notes the steps that were done, and what was logged."""

    def __init__(self):
        self.steps = 0
        self.logs = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


# --------------------------------------------------------------------------------------------------- what is merged


@pytest.mark.parametrize("adapter", [False, True])
def test_the_merged_model_is_the_merge_of_what_was_trained_and_the_other_experts(models, tmp_path, adapter):
    base, other = models
    trainer = train(classifier(base, adapter=adapter), tmp_path / "run", NeuroMergeCallback([other]))
    trained = tmp_path / "run" / "trained"
    merge([trained, other], tmp_path / "expected", base_model=base)
    expected, found = contents(tmp_path / "expected"), contents(tmp_path / "run" / "merged")
    assert found.keys() == expected.keys()
    assert found["model.safetensors"] == expected["model.safetensors"]
    assert found["heads/trained/head.safetensors"] == expected["heads/trained/head.safetensors"]
    saved = load_adapted(base, trained, CLASSIFIER) if adapter else classifier(trained)
    assert measure(saved) == pytest.approx(measure(trainer.model), abs=1e-6)
    assert (trained / "adapter_config.json").exists() == adapter


def test_settings_reach_the_merge(models, tmp_path):
    base, other = models
    config = NeuroMergingConfig(density=0.5, lambda_parallel=0.3)
    callback = NeuroMergeCallback([other], config=config, output_dir=tmp_path / "there", dtype="bfloat16")
    train(classifier(base), tmp_path / "run", callback)
    recipe = load_recipe(tmp_path / "there" / "recipe.yaml")
    assert (recipe.config, recipe.dtype) == (config, "bfloat16")
    assert not (tmp_path / "run" / "merged").exists()


def test_the_best_model_is_merged_if_it_was_loaded(models, tmp_path):
    base, other = models
    trainer = train(
        classifier(base),
        tmp_path,
        NeuroMergeCallback([other]),
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the worst, which is the first
        save_strategy="steps",
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
    )
    assert trainer.state.best_global_step == 1
    best, trained = (load_file(tmp_path / name / "model.safetensors") for name in ("checkpoint-1", "trained"))
    assert all(torch.equal(best[name], trained[name]) for name in best)
    losses = {entry["step"]: entry["eval_loss"] for entry in logged(trainer, "eval_loss")}
    assert len(losses) == 4, "the best model was not evaluated again"
    results = load_report(tmp_path / "merged").results
    assert losses[1] in [result.value for result in results if result.model == "trained"]


@pytest.mark.parametrize(("checkpoints", "expected"), [("all", [1, 2, 3]), (2, [2, 3])])
def test_checkpoints_of_the_run_are_merged_too(models, tmp_path, checkpoints, expected):
    base, other = models
    (tmp_path / "checkpoint-2").mkdir()  # of an earlier run in the same folder
    (tmp_path / "checkpoint-7").mkdir()
    callback = NeuroMergeCallback([other], checkpoints=checkpoints)
    train(classifier(base), tmp_path, callback, save_strategy="steps", save_steps=1, save_only_model=True)
    names = [expert.name for expert in load_report(tmp_path / "merged").experts]
    assert names == ["trained", *(f"checkpoint-{step}" for step in expected), "other"]


def test_a_run_may_be_merged_with_its_own_checkpoints_alone(models, tmp_path):
    train(
        classifier(models[0], adapter=True),
        tmp_path,
        NeuroMergeCallback(checkpoints="all"),
        save_strategy="steps",
        save_steps=2,
    )
    assert [expert.name for expert in load_report(tmp_path / "merged").experts] == ["trained", "checkpoint-2"]


def test_a_resumed_run_merges_the_checkpoints_that_it_saved_before(models, tmp_path):
    base, other = models
    saving = {"save_strategy": "steps", "save_steps": 1, "restore_callback_states_from_checkpoint": True}
    train(classifier(base), tmp_path, NeuroMergeCallback([other]), **saving, max_steps=2)
    trainer = train(classifier(base), tmp_path, NeuroMergeCallback([other], checkpoints="all"), resume=True, **saving)
    assert trainer.state.global_step == 4
    names = [expert.name for expert in load_report(tmp_path / "merged").experts]
    assert names == ["trained", "checkpoint-1", "checkpoint-2", "checkpoint-3", "other"]


@pytest.mark.parametrize("when", ["save", "epoch"])
def test_each_checkpoint_or_epoch_can_be_merged(models, tmp_path, when):
    base, other = models
    changes = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch"}
    trainer = train(classifier(base), tmp_path, NeuroMergeCallback([other], when=when), **changes)
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == ["step-4", "step-8"]
    assert [entry["step"] for entry in logged(trainer, "merged_eval_loss")] == [4, 8]
    merge([tmp_path / "checkpoint-4", other], tmp_path / "expected", base_model=base)
    found, expected = (
        load_file(path / "model.safetensors") for path in (tmp_path / "merged/step-4", tmp_path / "expected")
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --------------------------------------------------------------------------------------------- what stays as it is


class Dropouts(TrainerCallback):
    """A model that draws random numbers when it is trained, so that a trace in their state would be seen."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1


@pytest.mark.parametrize("adapter", [False, True])
def test_merging_and_evaluating_in_the_middle_changes_nothing_of_the_training(models, tmp_path, adapter):
    base, other = models
    changes = {
        "max_steps": -1,
        "num_train_epochs": 2,
        "logging_strategy": "epoch",
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "lr_scheduler_type": "linear",
    }
    plain = train(classifier(base, adapter=adapter), tmp_path / "plain", Dropouts(), **changes)
    recorder = Recorder()
    callback = NeuroMergeCallback([other], when="epoch")
    trainer = train(classifier(base, adapter=adapter), tmp_path / "run", Dropouts(), callback, recorder, **changes)
    expected, found = plain.model.state_dict(), trainer.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    assert [entry["loss"] for entry in logged(trainer, "loss")] == [entry["loss"] for entry in logged(plain, "loss")]
    assert recorder.steps == 8
    assert trainer.state.best_metric == plain.state.best_metric
    modes = [module.training for module in plain.model.modules()]
    assert [module.training for module in trainer.model.modules()] == modes
    flags = [parameter.requires_grad for parameter in plain.model.parameters()]
    assert [parameter.requires_grad for parameter in trainer.model.parameters()] == flags


def test_control_and_randomness_are_as_before_the_merge(models, tmp_path):
    base, other = models

    class Watcher(TrainerCallback):
        """Added after the merging one, which goes first all the same."""

        def on_init_end(self, args, state, control, **kwargs):
            self.before = None

        def on_epoch_end(self, args, state, control, **kwargs):
            self.seen = (control.should_log, control.should_evaluate, torch.get_rng_state(), random.getstate())

    changes = {"logging_strategy": "epoch", "eval_strategy": "epoch"}
    plain, merging = Watcher(), Watcher()
    train(classifier(base), tmp_path / "plain", plain, **changes)
    state = (np.random.get_state()[1].copy(), plain.seen)
    train(classifier(base), tmp_path / "run", merging, NeuroMergeCallback([other], when="epoch"), **changes)
    assert merging.seen[:2] == plain.seen[:2] == (True, True)
    assert torch.equal(merging.seen[2], plain.seen[2])
    assert merging.seen[3] == plain.seen[3]
    assert state[0].shape == np.random.get_state()[1].shape


# ----------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("adapter", [False, True])
def test_the_merged_models_metrics_stand_beside_the_trained_models(models, tmp_path, adapter):
    base, other = models
    recorder = Recorder()
    trainer = train(
        classifier(base, adapter=adapter), tmp_path, NeuroMergeCallback([other]), recorder, eval_strategy="epoch"
    )
    (trained,), (merged,) = logged(trainer, "eval_loss"), logged(trainer, "merged_eval_loss")
    assert merged["step"] == trained["step"] == 4
    expected = measure(AutoMergedModel.from_pretrained(tmp_path / "merged", head="trained"))
    assert merged["merged_eval_loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert merged["merged_eval_accuracy"] == expected["accuracy"]
    assert merged["merged_eval_loss"] != pytest.approx(trained["eval_loss"], abs=1e-4)
    assert any("merged_eval_loss" in logs for logs in recorder.logs)

    results = {(result.model, result.metric): result.value for result in load_report(tmp_path / "merged").results}
    assert results == {
        ("merged", "loss"): merged["merged_eval_loss"],
        ("merged", "accuracy"): merged["merged_eval_accuracy"],
        ("trained", "loss"): trained["eval_loss"],
        ("trained", "accuracy"): trained["eval_accuracy"],
    }
    card = (tmp_path / "merged" / "README.md").read_text()
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
    assert not load_report(tmp_path / "merged").results


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
    trials = json.loads((tmp_path / "merged" / "tuning.json").read_text())["trials"]
    scores = [trial["score"] for trial in trials]
    assert len(trials) == 4
    assert len(set(scores)) > 1 or metric, "the candidates are what is evaluated"
    best = max(scores) if metric else min(scores)
    assert merged[f"merged_eval_{metric or 'loss'}"] == pytest.approx(best, abs=1e-6)
    assert load_recipe(tmp_path / "merged" / "recipe.yaml").tuned_on == "evaluation set of the training"
    saved = load_adapted(base, tmp_path / "trained", CLASSIFIER) if adapter else classifier(tmp_path / "trained")
    assert measure(model) == pytest.approx(measure(saved), abs=1e-6), "the model has its own weights again"
    assert [len(logged(trainer, name)) for name in ("eval_loss", "merged_eval_loss")] == [1, 1]
    if not adapter:
        found = AutoMergedModel.from_pretrained(tmp_path / "merged", head="trained")
        assert measure(found)["loss"] == pytest.approx(merged["merged_eval_loss"], abs=1e-6)


def test_tuning_that_cannot_be_is_refused_before_training(models, tmp_path):
    base, other = models
    with pytest.raises(MergeError, match="TIESConfig has not"):
        NeuroMergeCallback([other], config=TIESConfig(), tune=True)
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


# ------------------------------------------------------------------------------------------ wrong before training


def test_the_first_checkpoint_waits_for_another_to_be_merged_with(models, tmp_path):
    callback = NeuroMergeCallback(checkpoints="all", when="save", evaluate=False)
    train(classifier(models[0]), tmp_path, callback, save_strategy="steps", save_steps=2)
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["step-4"]


def refused(model, folder, callback, match, **changes):
    """The training is refused before its first step; what was said."""
    recorder = Recorder()
    with pytest.raises(MergeError, match=match) as raised:
        train(model, folder, recorder, callback, **changes)
    assert recorder.steps == 0
    return str(raised.value)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_wrong_expert_stops_a_run_before_its_first_step(models, tmp_path, adapter):
    base, other = models
    wider = save_bert(tmp_path / "wider", intermediate_size=64)
    model = classifier(base, adapter=adapter)
    message = refused(model, tmp_path / "run", NeuroMergeCallback([other, wider, tmp_path / "absent"]), "2 problems")
    assert str(wider) in message
    assert "absent" in message


def test_a_wrong_base_is_said_of_the_model_in_training(models, tmp_path):
    base, other = models
    wider = save_bert(tmp_path / "wider", intermediate_size=64)
    callback = NeuroMergeCallback([other], base_model=wider)
    assert "the model in training" in refused(classifier(base), tmp_path / "run", callback, "architectures differ")


def test_an_output_directory_that_is_no_earlier_merge_is_refused_before_training(models, tmp_path):
    base, other = models
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    callback = NeuroMergeCallback([other], output_dir=tmp_path / "full")
    refused(classifier(base), tmp_path / "run", callback, "not empty")


def test_an_earlier_merge_is_replaced(models, tmp_path):
    base, other = models
    for density in (0.2, 1.0):
        callback = NeuroMergeCallback([other], config=NeuroMergingConfig(density=density), evaluate=False)
        train(classifier(base), tmp_path, callback)
        assert load_recipe(tmp_path / "merged" / "recipe.yaml").config.density == density


def test_checkpoints_are_refused_where_none_are_saved(models, tmp_path):
    refused(classifier(models[0]), tmp_path, NeuroMergeCallback(checkpoints="all"), "saves no checkpoints")
    refused(classifier(models[0]), tmp_path, NeuroMergeCallback([models[1]], when="save"), "saves no checkpoints")


@pytest.mark.parametrize("options", [{"device": "abacus"}, {"max_shard_size": "5XX"}])
def test_what_only_the_merge_itself_needs_is_checked_before_training(models, tmp_path, options):
    base, other = models
    refused(classifier(base), tmp_path, NeuroMergeCallback([other], **options), next(iter(options)))


def test_an_expert_that_the_trained_model_would_overwrite_is_refused(models, tmp_path):
    base, other = models
    shutil.copytree(other, tmp_path / "trained")
    refused(classifier(base), tmp_path, NeuroMergeCallback([tmp_path / "trained"]), "would be overwritten")
    callback = NeuroMergeCallback([other], base_model=tmp_path / "trained")
    refused(classifier(base), tmp_path, callback, "would be overwritten")


@pytest.mark.parametrize(
    ("arguments", "kind", "match"),
    [
        ({}, MergeError, "nothing to merge"),
        ({"models": "one/model"}, MergeError, "must be a list"),
        ({"models": ["a"], "config": {"density": 0.1}}, MergeError, "config must be"),
        ({"models": ["a"], "config": TIESConfig}, MergeError, "config must be"),
        ({"models": ["a"], "when": "never"}, MergeError, 'when must be "train_end"'),
        ({"models": ["a"], "checkpoints": 0}, MergeError, 'checkpoints must be "all"'),
        ({"models": ["a"], "checkpoints": True}, MergeError, 'checkpoints must be "all"'),
        ({"models": ["a"], "overwrite": True}, TypeError, "no argument 'overwrite'"),
        ({"models": ["a"], "densty": 0.2}, TypeError, "no argument 'densty'"),
    ],
)
def test_wrong_arguments_are_refused_when_the_callback_is_made(arguments, kind, match):
    with pytest.raises(kind, match=match):
        NeuroMergeCallback(**arguments)


# ------------------------------------------------------------------------------------------------------- the base


def test_a_base_on_the_hub_is_that_of_the_beginning(models, hub, tmp_path):
    base, other = models
    commit = hub.add_folder("trained-from/base", base)

    class Newer(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            hub.add_folder("trained-from/base", other)

    train(classifier("trained-from/base"), tmp_path / "run", NeuroMergeCallback([other]), Newer())
    recipe = load_recipe(tmp_path / "run" / "merged" / "recipe.yaml")
    assert recipe.base_model.reference == f"trained-from/base@{commit}"


def test_an_adapter_that_is_trained_further_is_merged_into_its_base(models, tmp_path):
    base, other = models
    train(classifier(base, adapter=True), tmp_path / "first", NeuroMergeCallback([other], evaluate=False))
    model = PeftModel.from_pretrained(classifier(base), tmp_path / "first" / "trained", is_trainable=True)
    train(model, tmp_path / "second", NeuroMergeCallback([tmp_path / "first" / "trained"]))
    report = load_report(tmp_path / "second" / "merged")
    assert [expert.kind for expert in report.experts] == ["LoRA r=8", "LoRA r=8"]
    assert report.base_model == base.name


def test_transformers_own_adapters_are_trained_and_merged(models, tmp_path):
    base, other = models
    train(classifier(base, adapter=True), tmp_path / "first", NeuroMergeCallback([other], evaluate=False))
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model.load_adapter(tmp_path / "first" / "trained", is_trainable=True)
    trainer = train(model, tmp_path / "second", NeuroMergeCallback([other]))
    assert load_report(tmp_path / "second" / "merged").experts[0].kind == "LoRA r=8"
    expected = measure(AutoMergedModel.from_pretrained(tmp_path / "second" / "merged", head="trained"))
    (merged,) = logged(trainer, "merged_eval_loss")
    assert merged["merged_eval_loss"] == pytest.approx(expected["loss"], abs=1e-6)


def test_a_named_adapter_is_found_in_its_folder(models, tmp_path):
    base, other = models
    model = classifier(base)
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]), adapter_name="mine")
    train(model, tmp_path, NeuroMergeCallback([other]))
    assert [expert.name for expert in load_report(tmp_path / "merged").experts] == ["mine", "other"]


def test_a_model_with_random_weights_is_refused_with_what_to_pass(models, tmp_path):
    base, other = models
    config = AutoConfig.from_pretrained(base, num_labels=2)
    noted = BertForSequenceClassification(config)  # transformers notes the base's name, but the weights are others
    assert noted.name_or_path == str(base)
    message = refused(noted, tmp_path / "run", NeuroMergeCallback([other]), "not those of")
    assert "base_model=DIR" in message
    config._name_or_path = ""
    message = refused(BertForSequenceClassification(config), tmp_path / "run", NeuroMergeCallback([other]), "not known")
    assert "base_model=DIR" in message


def test_a_model_with_random_weights_that_were_saved_is_its_own_base(tmp_path):
    config = AutoConfig.from_pretrained(save_bert(tmp_path / "like"), num_labels=2)
    config._name_or_path = ""
    model = BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "start")
    other = save_fine_tune(tmp_path / "start", tmp_path / "other", seed=2)
    train(model, tmp_path / "run", NeuroMergeCallback([other], base_model=tmp_path / "start"))
    assert load_report(tmp_path / "run" / "merged").base_model == "start"


def test_a_checkpoint_of_the_same_run_is_no_base(models, tmp_path):
    base, other = models
    train(classifier(base), tmp_path, NeuroMergeCallback([other]), save_strategy="steps", save_steps=2)
    refused(classifier(tmp_path / "checkpoint-2"), tmp_path, NeuroMergeCallback([other]), "which this training saved")


# -------------------------------------------------------------------------------------------------------- failures


class Remover(TrainerCallback):
    """Takes an expert away in the middle of the training."""

    def __init__(self, folder):
        self.folder = folder

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.folder.rename(self.folder.with_name("hidden"))


@pytest.mark.parametrize(
    "config",
    [NeuroMergingConfig(density=0.3, exclude=("*.bias", "*Norm*")), DARETIESConfig(scale=0.7, exclude=["*.bias"])],
    ids=lambda config: config.method,
)
def test_a_merge_that_fails_names_the_trained_model_and_the_command_that_tries_again(models, tmp_path, config):
    base, other = models
    mine = tmp_path / "an expert's folder"
    shutil.copytree(other, mine)
    callback = NeuroMergeCallback([mine], config=config, token="hf_secret", dtype="bfloat16")
    with pytest.raises(MergeError) as raised:
        train(classifier(base), tmp_path / "run", callback, Remover(mine))
    message = str(raised.value)
    assert str(tmp_path / "run" / "trained") in message
    assert "hf_secret" not in message
    assert not (tmp_path / "run" / "merged").exists()

    mine.with_name("hidden").rename(mine)
    program, *words = shlex.split(message.splitlines()[-1])
    assert program == "neuromerge"
    assert CliRunner().invoke(app, words).exit_code == 0
    recipe = load_recipe(tmp_path / "run" / "merged" / "recipe.yaml")
    assert (recipe.config, recipe.dtype) == (config, "bfloat16")


def test_a_merge_that_fails_in_the_middle_does_not_stop_the_training(models, tmp_path):
    base, other = models
    mine = tmp_path / "mine"
    shutil.copytree(other, mine)
    recorder = Recorder()
    callback = NeuroMergeCallback([mine], when="save")
    saving = {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(MergeError, match="could not be merged"):
        train(classifier(base), tmp_path / "run", callback, Remover(mine), recorder, **saving)
    assert recorder.steps == 4
    assert [path.name for path in (tmp_path / "run" / "merged").iterdir()] == ["step-1"]
    assert (tmp_path / "run" / "checkpoint-4").is_dir()


def test_an_evaluation_that_fails_says_where_the_merged_model_is(models, tmp_path):
    base, other = models
    trainer = make_trainer(classifier(base), tmp_path, NeuroMergeCallback([other]))

    def fail(prediction):
        raise RuntimeError("no such metric")

    trainer.compute_metrics = fail
    with pytest.raises(MergeError, match=rf"(?s){tmp_path / 'merged'}.*could not be evaluated.*no such metric"):
        trainer.train()
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert trainer.callback_handler.callbacks, "the trainer has its callbacks again"
    assert trainer.optimizer is not None


def test_weights_that_the_merge_has_untied_cannot_be_evaluated_in_a_tied_model():
    model = torch.nn.ModuleDict({"one": torch.nn.Linear(2, 2, bias=False), "two": torch.nn.Linear(2, 2, bias=False)})
    model["two"].weight = model["one"].weight
    live = model.state_dict()
    merged = {"one.weight": torch.ones(2, 2), "two.weight": torch.zeros(2, 2)}
    with pytest.raises(MergeError, match=r"one tensor for one\.weight and two\.weight"):
        _check_fit(live, merged)


def test_zero_3_without_gathering_is_refused():
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}
    with pytest.raises(MergeError, match='Set "stage3_gather_16bit_weights_on_model_save": true'):
        check_zero({"zero_optimization": zero})
    check_zero({"zero_optimization": {**zero, "stage3_gather_16bit_weights_on_model_save": True}})
    check_zero({"zero_optimization": {"stage": 2}})


# ----------------------------------------------------------------------------------------------------- state, search


def test_the_trainers_state_saves_and_loads_with_the_callback_in_place(models, tmp_path):
    base, other = models
    callback = NeuroMergeCallback([other], when="save")
    trainer = train(classifier(base), tmp_path, callback, save_strategy="steps", save_steps=2)
    state = TrainerState.load_from_json(str(tmp_path / "checkpoint-4" / "trainer_state.json"))
    assert state.global_step == 4
    assert "merged_eval_loss" in json.dumps(state.log_history)
    assert pickle.loads(pickle.dumps(callback)).__dict__.keys() == callback.__dict__.keys()
    held = [type(value) for value in vars(callback).values()]
    assert not any(issubclass(kind, type(trainer)) for kind in held)


def test_pruned_trials_of_a_search_merge_nothing(models, tmp_path):
    base, other = models
    changes = {"eval_strategy": "steps", "eval_steps": 2}

    class SecondIsPruned(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.number == 1

    trainer = make_trainer(None, tmp_path, NeuroMergeCallback([other]), init=lambda trial: classifier(base), **changes)
    optuna.logging.disable_default_handler()
    trainer.hyperparameter_search(
        lambda trial: {"seed": trial.suggest_int("seed", 1, 9)},
        n_trials=3,
        backend="optuna",
        sampler=optuna.samplers.RandomSampler(seed=0),
        pruner=SecondIsPruned(),
    )
    merged = sorted(path.parent.name for path in tmp_path.glob("*/merged"))
    assert merged == ["run-0", "run-2"]


# --------------------------------------------------------------------------------------------------- kinds of training


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's compiler uses it itself
@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2, "max_steps": 2},
        {"bf16": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_ways_of_training(models, tmp_path, changes):
    base, other = models
    with torch.compiler.set_stance("force_eager"):  # compiling takes time, and is not ours to test
        trainer = train(classifier(base), tmp_path, NeuroMergeCallback([other]), **changes)
    merge([tmp_path / "trained", other], tmp_path / "expected", base_model=base)
    for name in ("model.safetensors", "heads/trained/head.safetensors"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    expected = measure(AutoMergedModel.from_pretrained(tmp_path / "merged", head="trained"))
    (merged,) = logged(trainer, "merged_eval_loss")
    assert merged["merged_eval_loss"] == pytest.approx(expected["loss"], abs=2e-2 if "bf16" in changes else 1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's compiler uses it itself
def test_a_model_that_the_user_compiled(models, tmp_path):
    base, other = models
    model = torch.compile(classifier(base))
    changes = {"remove_unused_columns": False, "label_names": ["labels"]}  # the Trainer cannot look into it
    with torch.compiler.set_stance("force_eager"):  # what matters here are its names, and compiling takes time
        trainer = train(model, tmp_path, NeuroMergeCallback([other]), **changes)
        assert measure(classifier(tmp_path / "trained")) == pytest.approx(measure(model), abs=1e-6)
    assert trainer.model is model
    assert logged(trainer, "merged_eval_loss")


# ------------------------------------------------------------------------------------------------------------ push


def test_the_merged_model_is_pushed_with_its_card(models, hub, tmp_path):
    base, other = models
    callback = NeuroMergeCallback([other], push_to_hub=True, hub_model_id="callbacks/pushed")
    trainer = train(classifier(base), tmp_path, callback, eval_strategy="epoch")
    pushed = hub.files("callbacks/pushed")
    assert pushed["model.safetensors"] == (tmp_path / "merged" / "model.safetensors").read_bytes()
    card = pushed["README.md"].decode()
    assert f"{logged(trainer, 'merged_eval_loss')[0]['merged_eval_accuracy']:.3g}" in card
    assert "evaluation set of the training" in card
    assert not any(str(tmp_path) in content.decode(errors="ignore") for content in pushed.values())


def test_a_repository_is_named_after_the_run(models, hub, tmp_path):
    base, other = models
    train(classifier(base), tmp_path, NeuroMergeCallback([other], push_to_hub=True), hub_model_id="callbacks/rhymes")
    assert "model.safetensors" in hub.files("callbacks/rhymes-merged")


def test_a_push_that_cannot_succeed_stops_a_run_before_its_first_step(models, hub, tmp_path):
    base, other = models
    callback = NeuroMergeCallback([other], push_to_hub=True, token=False)
    refused(classifier(base), tmp_path, callback, "cannot be pushed to .*-merged.*hf auth login")
    callback = NeuroMergeCallback([other], push_to_hub=True, hub_model_id="not a name")
    refused(classifier(base), tmp_path, callback, "hub_model_id=.* is no id of a repository")


def test_a_hub_that_cannot_be_reached_stops_a_run_before_its_first_step(models, tmp_path, monkeypatch):
    base, other = models
    monkeypatch.setattr(publish, "HfApi", partial(HfApi, endpoint="http://127.0.0.1:9"))  # where nothing listens
    callback = NeuroMergeCallback([other], push_to_hub=True, hub_model_id="callbacks/far", token="hf_secret")
    assert "hf_secret" not in refused(classifier(base), tmp_path, callback, r"cannot be pushed.*refused\. Log in")


def test_a_push_that_fails_leaves_the_merged_model_and_says_how_to_go_on(models, hub, tmp_path):
    base, other = models
    hub.fail("POST /api/repos/create", 500, times=9)
    callback = NeuroMergeCallback([other], push_to_hub=True, hub_model_id="callbacks/late")
    with pytest.raises(MergeError, match=rf"neuromerge push {tmp_path / 'merged'} callbacks/late"):
        train(classifier(base), tmp_path, callback)
    hub.forget_traffic()
    assert (tmp_path / "merged" / "model.safetensors").is_file()
