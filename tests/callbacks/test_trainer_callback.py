"""NeuroMergeCallback merges what the Trainer of transformers trained, and changes nothing of the training."""

import json
import pickle
import random

import numpy as np
import optuna
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    TrainerCallback,
    TrainerState,
)

from neuromerge_hf import (
    AutoMergedModel,
    AverageConfig,
    NeuroMergeCallback,
    NeuroMergingConfig,
    merge,
)
from neuromerge_hf.callbacks.common.weights import own_weights
from neuromerge_hf.errors import MergeError
from neuromerge_hf.folder.recipe import load_recipe
from neuromerge_hf.folder.report import load_report
from tiny_models import contents, load, load_adapted
from tiny_training import (
    CLASSIFIER,
    MERGED,
    TRAINED,
    classifier,
    logged,
    make_trainer,
    measure,
    merge_of,
    merges,
    train,
)
from trainer_callbacks import Dropouts, Recorder


@pytest.mark.parametrize("adapter", [False, True])
def test_the_merged_model_is_the_merge_of_what_was_trained_and_the_other_experts(models, tmp_path, adapter):
    base, other = models
    trainer = train(classifier(base, adapter=adapter), tmp_path / "run", NeuroMergeCallback([other]))
    trained = tmp_path / "run" / TRAINED
    merge([trained, other], tmp_path / "expected", base_model=base)
    expected, found = contents(tmp_path / "expected"), contents(tmp_path / "run" / MERGED)
    assert found.keys() == expected.keys()
    assert found["model.safetensors"] == expected["model.safetensors"]
    assert found["heads/trained/head.safetensors"] == expected["heads/trained/head.safetensors"]
    saved = load_adapted(base, trained, CLASSIFIER) if adapter else classifier(trained)
    assert measure(saved) == pytest.approx(measure(trainer.model), abs=1e-6)
    assert (trained / "adapter_config.json").exists() == adapter


def test_another_expert_can_be_in_memory(models, tmp_path):
    base, other = models
    train(classifier(base), tmp_path / "run", NeuroMergeCallback({"other": classifier(other)}))
    merge([tmp_path / "run" / TRAINED, other], tmp_path / "expected", base_model=base)
    expected, found = contents(tmp_path / "expected"), contents(tmp_path / "run" / MERGED)
    assert found["model.safetensors"] == expected["model.safetensors"]


def test_settings_reach_the_merge(models, tmp_path):
    base, other = models
    config = NeuroMergingConfig(density=0.5, lambda_parallel=0.3)
    callback = NeuroMergeCallback([other], config=config, output_dir=tmp_path / "there", dtype="bfloat16")
    train(classifier(base), tmp_path / "run", callback)
    recipe = load_recipe(tmp_path / "there" / "recipe.yaml")
    assert (recipe.spec.config, recipe.spec.dtype) == (config, "bfloat16")
    assert not (tmp_path / "run" / MERGED).exists()


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
    best, trained = (load_file(tmp_path / name / "model.safetensors") for name in ("checkpoint-1", TRAINED))
    assert all(torch.equal(best[name], trained[name]) for name in best)
    losses = {entry["step"]: entry["eval_loss"] for entry in logged(trainer, "eval_loss")}
    assert len(losses) == 4, "the best model was not evaluated again"
    results = load_report(tmp_path / MERGED).results
    assert losses[1] in [result.value for result in results if result.model == "trained"]


@pytest.mark.parametrize(("checkpoints", "expected"), [("all", [1, 2, 3]), (2, [2, 3])])
def test_checkpoints_of_the_run_are_merged_too(models, tmp_path, checkpoints, expected):
    base, other = models
    (tmp_path / "checkpoint-2").mkdir()  # of an earlier run in the same folder
    (tmp_path / "checkpoint-7").mkdir()
    callback = NeuroMergeCallback([other], checkpoints=checkpoints)
    train(classifier(base), tmp_path, callback, save_strategy="steps", save_steps=1, save_only_model=True)
    names = [expert.name for expert in load_report(tmp_path / MERGED).experts]
    assert names == ["trained", *(f"checkpoint-{step}" for step in expected), "other"]


def test_a_run_may_be_merged_with_its_own_checkpoints_alone(models, tmp_path):
    train(
        classifier(models[0], adapter=True),
        tmp_path,
        NeuroMergeCallback(checkpoints="all"),
        save_strategy="steps",
        save_steps=2,
    )
    assert [expert.name for expert in load_report(tmp_path / MERGED).experts] == ["trained", "checkpoint-2"]


def test_a_resumed_run_merges_the_checkpoints_that_it_saved_before(models, tmp_path):
    base, other = models
    saving = {"save_strategy": "steps", "save_steps": 1, "restore_callback_states_from_checkpoint": True}
    train(classifier(base), tmp_path, NeuroMergeCallback([other]), **saving, max_steps=2)
    trainer = train(classifier(base), tmp_path, NeuroMergeCallback([other], checkpoints="all"), resume=True, **saving)
    assert trainer.state.global_step == 4
    names = [expert.name for expert in load_report(tmp_path / MERGED).experts]
    assert names == ["trained", "checkpoint-1", "checkpoint-2", "checkpoint-3", "other"]


@pytest.mark.parametrize("when", ["save", "epoch"])
def test_each_checkpoint_or_epoch_can_be_merged(models, tmp_path, when):
    base, other = models
    changes = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch"}
    trainer = train(classifier(base), tmp_path, NeuroMergeCallback([other], when=when), **changes)
    assert merges(tmp_path) == {4, 8}
    assert [entry["step"] for entry in logged(trainer, "merged_eval_loss")] == [4, 8]
    merge([tmp_path / "checkpoint-4", other], tmp_path / "expected", base_model=base)
    found, expected = (load_file(path / "model.safetensors") for path in (merge_of(tmp_path, 4), tmp_path / "expected"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


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
        "metric_for_best_model": "loss",
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
    assert trainer.state.best_metric == plain.state.best_metric is not None
    modes = [module.training for module in plain.model.modules()]
    assert [module.training for module in trainer.model.modules()] == modes
    flags = [parameter.requires_grad for parameter in plain.model.parameters()]
    assert [parameter.requires_grad for parameter in trainer.model.parameters()] == flags


def test_control_and_randomness_are_as_before_the_merge(models, tmp_path):
    base, other = models

    class Watcher(TrainerCallback):
        """Added after the merging one, which goes first all the same."""

        def on_epoch_end(self, args, state, control, **kwargs):
            self.control = (control.should_log, control.should_evaluate)
            self.states = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())

    changes = {"logging_strategy": "epoch", "eval_strategy": "epoch"}
    plain, merging = Watcher(), Watcher()
    train(classifier(base), tmp_path / "plain", plain, **changes)
    train(classifier(base), tmp_path / "run", merging, NeuroMergeCallback([other], when="epoch"), **changes)
    assert merging.control == plain.control == (True, True)
    assert merging.states == plain.states


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

    callback = NeuroMergeCallback([other], evaluate=False)  # so that none is known to be the best
    trainer = make_trainer(None, tmp_path, callback, init=lambda trial: classifier(base), **changes)
    optuna.logging.disable_default_handler()
    trainer.hyperparameter_search(
        lambda trial: {"seed": trial.suggest_int("seed", 1, 9)},
        n_trials=3,
        backend="optuna",
        sampler=optuna.samplers.RandomSampler(seed=0),
        pruner=SecondIsPruned(),
    )
    assert sorted(path.parent.parent.name for path in tmp_path.rglob("merge_report.json")) == ["run-0", "run-2"]


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
    merge([tmp_path / TRAINED, other], tmp_path / "expected", base_model=base)
    for name in ("model.safetensors", "heads/trained/head.safetensors"):
        assert (tmp_path / MERGED / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    expected = measure(AutoMergedModel.from_pretrained(tmp_path / MERGED, head="trained"))
    (merged,) = logged(trainer, "merged_eval_loss")
    assert merged["merged_eval_loss"] == pytest.approx(expected["loss"], abs=2e-2 if "bf16" in changes else 1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's compiler uses it itself
def test_a_model_that_the_user_compiled(models, tmp_path):
    base, other = models
    model = torch.compile(classifier(base))
    changes = {"remove_unused_columns": False, "label_names": ["labels"]}  # the Trainer cannot look into it
    with torch.compiler.set_stance("force_eager"):  # what matters here are its names, and compiling takes time
        trainer = train(model, tmp_path, NeuroMergeCallback([other]), **changes)
        assert measure(classifier(tmp_path / TRAINED)) == pytest.approx(measure(model), abs=1e-6)
    assert trainer.model is model
    assert logged(trainer, "merged_eval_loss")


def test_the_trainer_can_be_passed_as_to_the_callbacks_of_trl(models, tmp_path, monkeypatch):
    base, other = models
    monkeypatch.setattr("neuromerge_hf.callbacks.transformers._calling_trainer", None)  # it is not looked for
    trainer = make_trainer(classifier(base), tmp_path / "run", save_strategy="steps", save_steps=2)
    trainer.add_callback(NeuroMergeCallback([other], checkpoints="all", trainer=trainer))
    trainer.train()
    experts = [tmp_path / "run" / TRAINED, tmp_path / "run" / "checkpoint-2", other]
    merge(experts, tmp_path / "expected", base_model=base)
    found, expected = (contents(folder) for folder in (tmp_path / "run" / MERGED, tmp_path / "expected"))
    assert found["model.safetensors"] == expected["model.safetensors"]


@pytest.mark.parametrize("adapter", [False, True])
def test_the_policy_may_be_merged_with_its_base_by_a_share(models, tmp_path, adapter):
    base, _ = models
    callback = NeuroMergeCallback([base], config=AverageConfig(weights=(3, 1)), evaluate=False)
    trainer = train(classifier(base, adapter=adapter), tmp_path, callback)
    if adapter:
        trainer.model.merge_adapter()
    trained, start, merged = own_weights(trainer.model), load(base).state_dict(), load(tmp_path / MERGED).state_dict()
    for name, weight in merged.items():
        share = 0.75 * trained[f"bert.{name}"].double() + 0.25 * start[name].double()
        torch.testing.assert_close(weight.double(), share, rtol=1e-6, atol=1e-7)


def test_what_is_not_the_trainer_is_refused(models, tmp_path):
    base, other = models
    with pytest.raises(MergeError, match="trainer must be a Trainer of transformers, not 'mine'"):
        NeuroMergeCallback([other], trainer="mine")
    with pytest.raises(TypeError, match="positional"):
        NeuroMergeCallback([other], *[None] * 10)
    elsewhere = make_trainer(classifier(base), tmp_path / "elsewhere")
    trainer = make_trainer(classifier(base), tmp_path / "run", NeuroMergeCallback([other], trainer=elsewhere))
    with pytest.raises(MergeError, match="trainer= is not the Trainer that NeuroMergeCallback was added to"):
        trainer.train()
