"""What users pass first: it works, or one sentence says at once what to pass instead."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from neuromerge_hf import (
    AutoMergedModel,
    AverageConfig,
    MergeError,
    TaskArithmeticConfig,
    TIESConfig,
    compare_methods,
    merge,
    merge_recipe,
    plan_merge,
    tune_lambdas,
)
from tiny_models import contents, save_mixed

CPU = {"device": "cpu"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixed(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    ("config", "meant"),
    [
        ("ties", TIESConfig()),
        ({"method": "ties", "density": 0.5}, TIESConfig(density=0.5)),
        ({"method": "average", "weights": [1, 3]}, AverageConfig(weights=(1, 3))),
        ({"scale": 0.3, "method": "task_arithmetic"}, TaskArithmeticConfig(scale=0.3)),
    ],
)
def test_a_method_is_chosen_by_its_name_or_a_dictionary(models, config, meant):
    assert plan_merge([models / "math", models / "code"], base_model=models / "base", config=config).config == meant


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("Ties", "method must be one of neuromerging"),
        ({"method": "ties", "densty": 1}, "config has 'densty', but ties only has"),
        ({"method": "ties", "density": 2}, "density must be a number with 0 < density <= 1"),
        (TIESConfig, "not the class of one: write TIESConfig()"),
        (3, "the name of a method"),
    ],
)
def test_a_config_that_is_none_is_refused_in_one_sentence(models, config, message):
    with pytest.raises(MergeError) as caught:
        plan_merge([models / "math"], base_model=models / "base", config=config)
    assert message in str(caught.value)


def test_methods_are_compared_by_their_names(models):
    def evaluate(model):
        return float(model.lm_head.weight.norm())

    experts = [models / "math", models / "code"]
    found = compare_methods(
        experts, evaluate, base_model=models / "base", methods=["ties", {"method": "average"}, TIESConfig(density=0.5)]
    )
    assert list(found.methods) == ["ties", "average", "ties (density 0.5)"]
    with pytest.raises(MergeError, match="methods must be a list"):
        compare_methods(experts, evaluate, base_model=models / "base", methods="ties")


@pytest.mark.parametrize("function", [tune_lambdas, compare_methods])
def test_a_missing_evaluation_is_found_at_once(models, function):
    started = time.perf_counter()
    with pytest.raises(MergeError, match="evaluate must be a function"):
        function([models / "math"], None, base_model=models / "base")
    assert time.perf_counter() - started < 5


def test_experts_have_the_names_that_the_user_gives_them(models, tmp_path):
    experts = {"sums": models / "math", "python": str(models / "lora")}
    report = merge(experts, tmp_path / "merged", base_model=models / "base", **CPU)
    assert [expert.name for expert in report.experts] == ["sums", "python"]
    again = merge_recipe(tmp_path / "merged" / "recipe.yaml", tmp_path / "again", **CPU)
    assert [expert.name for expert in again.experts] == ["sums", "python"]
    assert contents(tmp_path / "again") == contents(tmp_path / "merged")
    unnamed = merge(list(experts.values()), tmp_path / "unnamed", base_model=models / "base", **CPU)
    assert [expert.name for expert in unnamed.experts] == ["math", "lora"]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "unnamed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["", "a/b", "..", "base", "merged", "union", "a b", "x" * 101, 3])
def test_a_name_that_no_expert_can_have_is_refused(models, name):
    with pytest.raises(MergeError, match="cannot be the name of an expert"):
        plan_merge({name: models / "math"}, base_model=models / "base")


def test_a_merge_with_names_is_another_one_in_the_cache(models, tmp_path):
    options = {"base_model": models / "base", "merge_cache_dir": tmp_path, **CPU}
    for experts in ({"one": models / "math"}, {"other": models / "math"}, {"one": models / "math"}):
        AutoMergedModel.from_pretrained(experts, **options)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2


def test_a_model_that_is_given_twice_is_noted(models, tmp_path):
    plan = plan_merge([models / "math", models / "math", models / "base"], base_model=models / "base")
    assert "math-2 is the same model as math, and counts as another expert." in plan.notes
    assert "base is the base itself, which changes nothing, and counts as an expert." in plan.notes
    assert not plan_merge([models / "math", models / "code"], base_model=models / "base").notes


@pytest.mark.parametrize("given", [torch.nn.Linear(2, 2), 7, None, [torch.nn.Linear(2, 2)], {"a": 3}])
def test_what_is_no_list_of_models_is_refused_in_one_sentence(given):
    with pytest.raises(MergeError, match="models must be a list of at least one fine-tune or adapter"):
        AutoMergedModel.from_pretrained(given)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "average"])
def test_there_is_a_weight_for_each_expert(models, method):
    with pytest.raises(MergeError, match="weights has 3 entries"):
        plan_merge(
            [models / "math", models / "code"],
            base_model=models / "base",
            config={"method": method, "weights": (1, 2, 3)},
        )


def test_what_a_notebook_shows_fits_a_screen(models, tmp_path):
    experts = [models / "math", models / "code"]
    plan = plan_merge(experts, base_model=models / "base")
    report = merge(experts, tmp_path / "merged", base_model=models / "base", **CPU)
    compared = compare_methods(
        experts, lambda model: {"size": 1.0}, base_model=models / "base", methods=["ties", "average"]
    )
    for shown in (plan, report, compared):
        assert len(repr(shown)) < 200
        assert "\n" not in repr(shown)
        assert str(shown).strip() in shown._repr_markdown_()
        json.dumps(shown.to_dict())
    assert repr(plan) == f"<MergePlan: 2 experts into {models / 'base'}>"
    assert repr(report).startswith("<MergeReport: Merged 2 experts into base in ")
