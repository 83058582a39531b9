"""A training may end with a push of the merged model, which is checked before the training and never lost."""

from functools import partial

import pytest
from huggingface_hub import HfApi

from neuromerge_hf import (
    MergeError,
    NeuroMergeCallback,
)
from neuromerge_hf.callbacks.common import publish
from tiny_training import MERGED, classifier, logged, train
from trainer_callbacks import refused


def test_the_merged_model_is_pushed_with_its_card(models, hub, tmp_path):
    base, other = models
    callback = NeuroMergeCallback([other], push_to_hub=True, hub_model_id="callbacks/pushed")
    trainer = train(classifier(base), tmp_path, callback, eval_strategy="epoch")
    pushed = hub.files("callbacks/pushed")
    assert pushed["model.safetensors"] == (tmp_path / MERGED / "model.safetensors").read_bytes()
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
    with pytest.raises(MergeError, match=rf"neuromerge push {tmp_path / MERGED} callbacks/late"):
        train(classifier(base), tmp_path, callback)
    hub.forget_traffic()
    assert (tmp_path / MERGED / "model.safetensors").is_file()
