"""A callback's models are where the training neither uploads nor overwrites them, or the training does not start."""

import os
import subprocess
import sys

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from neuromerge_hf import MergeError, NeuroMergeCallback, NeuroMergingConfig, TIESConfig, merge_recipe
from neuromerge_hf.callbacks.lightning import NeuroMergeCallback as LightningCallback
from neuromerge_hf.folder.report import load_report
from tiny_lightning import Classifier, loader
from tiny_training import MERGED, TRAINED, classifier, logged, make_trainer, merge_of, train
from trainer_callbacks import refused

SAVING = {"save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
def test_the_pushes_of_the_training_upload_one_model_and_no_path_of_this_machine(models, hub, tmp_path, strategy):
    base, other = models
    name = f"callbacks/{strategy}"
    pushing = {"push_to_hub": True, "hub_model_id": name, "hub_strategy": strategy, **SAVING}
    callbacks = NeuroMergeCallback([other]), NeuroMergeCallback([other], when="save", metric_prefix="each")
    trainer = train(classifier(base), tmp_path / "run", *callbacks, **pushing)
    trainer.push_to_hub()
    files = hub.files(name)
    checkpoints = ("last-checkpoint/", "checkpoint-")
    assert [path for path in files if path.endswith(".safetensors") and not path.startswith(checkpoints)] == [
        "model.safetensors"
    ]
    assert not any("merge" in path for path in files)
    ours = [path for path, content in files.items() if b"neuromerge" in content and not path.startswith(checkpoints)]
    assert not ours
    assert (tmp_path / "run" / MERGED / "recipe.yaml").is_file()


@pytest.mark.parametrize("strategy", ["every_save", "all_checkpoints"])
def test_a_place_that_the_training_would_push_is_refused(models, hub, tmp_path, strategy):
    base, other = models
    run = tmp_path / "run"
    pushing = {"push_to_hub": True, "hub_model_id": "callbacks/reach", "hub_strategy": strategy, **SAVING}
    for place in ("mine", "checkpoints/mine"):
        callback = NeuroMergeCallback([other], output_dir=run / place)
        assert str(run / MERGED) in refused(classifier(base), run, callback, "would be uploaded", **pushing)
    inside = NeuroMergeCallback([other], when="save", in_checkpoints=True, evaluate=False)
    if strategy == "all_checkpoints":
        refused(classifier(base), run, inside, "would be uploaded", **pushing)
    else:
        train(classifier(base), run, inside, **pushing)
        assert not any("merge" in path for path in hub.files("callbacks/reach"))


@pytest.mark.parametrize(
    ("place", "match"),
    [
        (".", "training writes to"),
        ("..", "training writes to"),
        (TRAINED, "training writes to"),
        (TRAINED / "inside", "the trained model is saved there"),
        ("checkpoint-4", "a checkpoint of the training"),
        ("checkpoint-4/merged", "in_checkpoints=True"),
    ],
)
def test_a_place_that_cannot_be_is_refused_before_the_first_step(models, tmp_path, place, match):
    base, other = models
    run = tmp_path / "run"
    refused(classifier(base), run, NeuroMergeCallback([other], output_dir=run / place), match, **SAVING)
    assert not (run / TRAINED).exists()


def test_lightnings_checkpoints_are_not_replaced_by_a_merge(models, tmp_path):
    base, other = models
    callbacks = [LightningCallback([other], output_dir=tmp_path / "kept"), ModelCheckpoint(tmp_path / "kept")]
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=tmp_path / "run", callbacks=callbacks, logger=False
    )
    with pytest.raises(MergeError, match=r"training writes to .*kept"):
        trainer.fit(Classifier(classifier(base)), loader(), loader())
    assert trainer.global_step == 0


def test_merges_are_written_into_the_checkpoints_where_asked(models, tmp_path):
    base, other = models
    callback = NeuroMergeCallback([other], when="save", in_checkpoints=True)
    train(classifier(base), tmp_path, callback, **SAVING, save_total_limit=1)
    assert [path.parent for path in tmp_path.rglob("merge_report.json")] == [tmp_path / "checkpoint-4" / "merged"]
    assert callback.merged_dir == tmp_path / "checkpoint-4" / "merged"
    for wrong in ({"when": "epoch"}, {"when": "save", "output_dir": "there"}):
        with pytest.raises(MergeError, match='in_checkpoints=True needs when="save", and no output_dir'):
            NeuroMergeCallback([other], in_checkpoints=True, **wrong)


def test_two_callbacks_have_folders_and_metrics_of_their_own(models, tmp_path):
    base, other = models
    callbacks = [
        NeuroMergeCallback([other], config=config, metric_prefix=config.method)
        for config in (NeuroMergingConfig(), TIESConfig())
    ]
    trainer = train(classifier(base), tmp_path, *callbacks)
    for callback, name in zip(callbacks, ("neuromerging", "ties"), strict=True):
        assert callback.merged_dir == tmp_path / "_neuromerge" / name
        assert load_report(callback.merged_dir).method == callback.report.method == name
        [entry] = logged(trainer, f"{name}_eval_loss")
        assert callback.metrics[f"{name}_eval_loss"] == entry[f"{name}_eval_loss"]


def test_two_callbacks_that_would_overwrite_each_other_are_refused(models, tmp_path):
    base, other = models
    first = NeuroMergeCallback([other], push_to_hub=True)
    for second, match in (
        (NeuroMergeCallback([other]), "would write to .*metric_prefix"),
        (NeuroMergeCallback([other], output_dir=tmp_path / "there"), "have metric_prefix='merged'"),
        (NeuroMergeCallback([other], output_dir=tmp_path / MERGED, metric_prefix="x"), "would write to"),
        (NeuroMergeCallback([other], push_to_hub=True, metric_prefix="x"), "would push to .*-merged. Give each"),
    ):
        trainer = make_trainer(classifier(base), tmp_path, first, second)
        with pytest.raises(MergeError, match=match):
            trainer.train()
        assert trainer.state.global_step == 0


def test_a_home_that_is_none_is_refused_before_the_first_step(models, tmp_path):
    base, other = models
    callback = NeuroMergeCallback([other], output_dir="~nobody-of-this-name/merged")
    refused(classifier(base), tmp_path, callback, "output_dir.*~nobody-of-this-name")
    refused(classifier(base), tmp_path, NeuroMergeCallback(["~nobody-of-this-name/x"]), "~nobody-of-this-name")


@pytest.mark.parametrize("prefix", ["", "trained", "averaged", "a/b", "two words", 3])
def test_a_metric_prefix_is_a_word(prefix):
    with pytest.raises(MergeError, match="metric_prefix must be"):
        NeuroMergeCallback(["expert"], metric_prefix=prefix)


@pytest.mark.parametrize(
    ("name", "value"), [("output_dir", 5), ("evaluate", "no"), ("push_to_hub", "me/merged"), ("hub_model_id", 3)]
)
def test_settings_of_another_type_are_refused(name, value):
    with pytest.raises(MergeError, match=f"{name} must be"):
        NeuroMergeCallback(["expert"], **{name: value})


def test_each_merge_of_a_training_has_a_model_of_its_own_to_be_made_from_again(models, tmp_path):
    base, other = models
    changes = {"max_steps": -1, "num_train_epochs": 2}
    train(classifier(base), tmp_path / "run", NeuroMergeCallback([other], when="epoch", evaluate=False), **changes)
    for step in (4, 8):
        merged = merge_of(tmp_path / "run", step)
        merge_recipe(merged / "recipe.yaml", tmp_path / f"again-{step}")
        again = (tmp_path / f"again-{step}" / "model.safetensors").read_bytes()
        assert (merged / "model.safetensors").read_bytes() == again


@pytest.mark.parametrize("configured", [True, False])
def test_the_training_says_which_base_it_takes_and_where_the_merged_model_is(models, tmp_path, configured):
    base, other = models
    program = f"""
import logging
from neuromerge_hf import NeuroMergeCallback
from tiny_training import classifier, train
if {configured}:
    logging.basicConfig(format="LOG %(message)s")
train(classifier({str(base)!r}), {str(tmp_path / "run")!r}, NeuroMergeCallback([{str(other)!r}]))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    start = "LOG " if configured else ""
    lines = [line for line in done.stderr.splitlines() if "erge" in line]
    assert f"{start}The base of the merge is {base}. The merged model will be in {tmp_path / 'run' / MERGED}." in lines
    [last] = [line for line in lines if line.startswith(f"{start}Merged trained, other into base by NeuroIso")]
    assert f"saved in {tmp_path / 'run' / MERGED}; merged_eval_loss 0." in last
