"""Merges that a YAML file describes: one by hand, or one of mergekit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from merge_files import mergekit, write
from neuromerge_hf import (
    AverageConfig,
    DARETIESConfig,
    MergeError,
    TaskArithmeticConfig,
    TIESConfig,
    merge_recipe,
)
from tiny_models import save_mixed

CPU = {"device": "cpu"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixed(tmp_path_factory.mktemp("models"))


def test_a_file_by_hand_describes_a_merge(models, tmp_path):
    content = {
        "base_model": str(models / "base"),
        "models": {"sums": str(models / "math"), "python": str(models / "code")},
        "method": "ties",
        "config": {"density": 0.5},
        "dtype": "bfloat16",
    }
    report = merge_recipe(write(tmp_path / "merge.yaml", content), tmp_path / "merged", **CPU)
    assert [expert.name for expert in report.experts] == ["sums", "python"]
    assert (report.method, report.density) == ("ties", 0.5)
    assert load_file(tmp_path / "merged" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"densty": 1}, "'densty' is no setting of a merge"),
        ({"base": "x"}, "Did you mean 'base_model'?"),
        ({"config": {"densty": 1}}, "config has 'densty'"),
        ({"config": [1]}, "config must be a table of hyper-parameters"),
        ({"method": "tiess"}, "method must be one of"),
    ],
)
def test_a_file_by_hand_with_a_mistake_is_refused_with_its_name(models, tmp_path, change, message):
    content = {"base_model": str(models / "base"), "models": [str(models / "math")], **change}
    path = write(tmp_path / "merge.yaml", content)
    with pytest.raises(MergeError) as caught:
        merge_recipe(path, tmp_path / "merged")
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("method", "parameters", "shared", "meant"),
    [
        ("linear", ({"weight": 1}, {"weight": 3}), {}, AverageConfig(weights=(1, 3))),
        ("linear", ({"weight": 0.5}, {"weight": 0.5}), {"normalize": False}, AverageConfig()),
        ("task_arithmetic", ({}, {}), {"weight": 0.4}, TaskArithmeticConfig(scale=0.4)),
        ("task_arithmetic", ({"weight": 1}, {"weight": 3}), {"lambda": 2}, TaskArithmeticConfig(2, weights=(1, 3))),
        (
            "task_arithmetic",
            ({"weight": 1}, {"weight": 3}),
            {"normalize": True},
            TaskArithmeticConfig(0.25, weights=(1, 3)),
        ),
        ("ties", ({"density": 0.3}, {"density": 0.3}), {"lambda": 1.5, "int8_mask": True}, TIESConfig(0.3, 1.5)),
        ("ties", ({"weight": 1}, {"weight": 2}), {"density": 0.5}, TIESConfig(0.5, 1.0, weights=(1, 2))),
        ("dare_ties", ({}, {}), {"density": 0.75, "normalize": True}, DARETIESConfig(0.25, 1)),
    ],
)
def test_a_configuration_of_mergekit_is_understood(models, tmp_path, method, parameters, shared, meant):
    content = mergekit(models, method, *parameters, parameters=shared, dtype="float32")
    content["models"].append({"model": str(models / "base")}) if method != "linear" else None
    report = merge_recipe(write(tmp_path / "kit.yml", content), tmp_path / "merged", **CPU)
    assert report.method == meant.method
    assert report.settings == meant.to_dict()
    assert [expert.name for expert in report.experts] == ["math", "code"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"merge_method": "slerp"}, "the merge_method 'slerp' is not one of linear, task_arithmetic, ties, dare_ties"),
        ({"merge_method": ["ties"]}, "the merge_method ['ties'] is not one of"),
        ({"slices": []}, "slices is not supported"),
        ({"parameters": {"density": [0.1, 0.9]}}, "density of the configuration is not one number: gradients"),
        ({"parameters": {"epsilon": 0.1}}, "epsilon of the configuration is no parameter"),
        ({"parameters": {"normalize": False}}, "normalize is not true"),
        ({"merge_method": "dare_ties"}, "normalize is not true (the default of dare_ties)"),
        ({"models": [{"model": "a+lora"}]}, "'a+lora' is not one model"),
        ({"models": "a"}, "models is no list of models"),
        ({"base_model": None}, "it has no base_model"),
    ],
)
def test_a_configuration_of_mergekit_that_we_cannot_follow_is_refused_with_the_reason(models, tmp_path, change, reason):
    path = write(tmp_path / "kit.yml", {**mergekit(models, "ties"), **change})
    with pytest.raises(MergeError) as caught:
        merge_recipe(path, tmp_path / "merged")
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)


def test_different_densities_are_refused(models, tmp_path):
    content = mergekit(models, "ties", {"density": 0.2}, {"density": 0.3})
    with pytest.raises(MergeError, match="different densities"):
        merge_recipe(write(tmp_path / "kit.yml", content), tmp_path / "merged")
