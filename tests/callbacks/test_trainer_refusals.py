"""What cannot be merged stops a training before its first step; what fails later loses nothing that was trained."""

import shlex
import shutil

import pytest
import torch
from typer.testing import CliRunner

from neuromerge_hf import (
    DARETIESConfig,
    MergeError,
    NeuroMergeCallback,
    NeuroMergingConfig,
    TIESConfig,
)
from neuromerge_hf.callbacks.common.sharded import check_zero
from neuromerge_hf.callbacks.common.weights import _check_fit
from neuromerge_hf.cli import app
from neuromerge_hf.folder.recipe import load_recipe
from tiny_models import save_bert
from tiny_training import MERGED, TRAINED, classifier, make_trainer, merges, train
from trainer_callbacks import Recorder, Remover, refused


def test_the_first_checkpoint_waits_for_another_to_be_merged_with(models, tmp_path):
    callback = NeuroMergeCallback(checkpoints="all", when="save", evaluate=False)
    train(classifier(models[0]), tmp_path, callback, save_strategy="steps", save_steps=2)
    assert merges(tmp_path) == {4}


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
        assert load_recipe(tmp_path / MERGED / "recipe.yaml").spec.config.density == density


def test_checkpoints_are_refused_where_none_are_saved(models, tmp_path):
    refused(classifier(models[0]), tmp_path, NeuroMergeCallback(checkpoints="all"), "saves no checkpoints")
    refused(classifier(models[0]), tmp_path, NeuroMergeCallback([models[1]], when="save"), "saves no checkpoints")


@pytest.mark.parametrize("options", [{"device": "abacus"}, {"max_shard_size": "5XX"}])
def test_what_only_the_merge_itself_needs_is_checked_before_training(models, tmp_path, options):
    base, other = models
    refused(classifier(base), tmp_path, NeuroMergeCallback([other], **options), next(iter(options)))


def test_an_expert_that_the_trained_model_would_overwrite_is_refused(models, tmp_path):
    base, other = models
    shutil.copytree(other, tmp_path / TRAINED)
    refused(classifier(base), tmp_path, NeuroMergeCallback([tmp_path / TRAINED]), "would be overwritten")
    callback = NeuroMergeCallback([other], base_model=tmp_path / TRAINED)
    refused(classifier(base), tmp_path, callback, "would be overwritten")


@pytest.mark.parametrize(
    ("arguments", "kind", "match"),
    [
        ({}, MergeError, "nothing to merge"),
        ({"models": "one/model"}, MergeError, "must be a list"),
        ({"models": ["a"], "config": {"densty": 0.1}}, MergeError, "config has 'densty'"),
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
    assert str(tmp_path / "run" / TRAINED) in message
    assert "hf_secret" not in message
    assert not (tmp_path / "run" / MERGED).exists()

    mine.with_name("hidden").rename(mine)
    program, *words = shlex.split(message.splitlines()[-1])
    assert program == "neuromerge"
    assert CliRunner().invoke(app, words).exit_code == 0
    recipe = load_recipe(tmp_path / "run" / MERGED / "recipe.yaml")
    assert (recipe.spec.config, recipe.spec.dtype) == (config, "bfloat16")


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
    assert merges(tmp_path / "run") == {1}
    assert (tmp_path / "run" / "checkpoint-4").is_dir()


def test_an_evaluation_that_fails_says_where_the_merged_model_is(models, tmp_path):
    base, other = models
    trainer = make_trainer(classifier(base), tmp_path, NeuroMergeCallback([other]))

    def fail(prediction):
        raise RuntimeError("no such metric")

    trainer.compute_metrics = fail
    with pytest.raises(MergeError, match=rf"(?s){tmp_path / MERGED}.*could not be evaluated.*no such metric"):
        trainer.train()
    assert (tmp_path / MERGED / "model.safetensors").is_file()
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
