"""Models are resolved once, planned once, and read once: what one step found is passed to the next."""

from collections import Counter
from pathlib import Path

import pytest

from neuromerge_hf import AutoMergedModel, AverageConfig, TuningGrid, compare_methods, plan_merge, tune_lambdas
from neuromerge_hf.planning import planner, resolve
from neuromerge_hf.skeleton import Skeleton
from neuromerge_hf.skeleton.model import _build
from neuromerge_hf.storage import formats
from neuromerge_hf.storage.location import Location


@pytest.fixture
def counted(monkeypatch) -> Counter[str]:
    """How often models are located, planned, opened and built from here on."""
    counts: Counter[str] = Counter()

    def count(owner, name, label):
        original = getattr(owner, name)

        def counting(*arguments, **options):
            counts[label(arguments)] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, counting)

    count(resolve, "locate", lambda arguments: f"located {Path(arguments[0]).name}")
    count(planner, "open_base", lambda arguments: "planned")
    count(formats, "read_header", lambda arguments: f"header of {arguments[0].parent.name}")
    count(Skeleton, "__init__", lambda arguments: f"built {arguments[1].__name__} {arguments[2].to_json_string()}")
    _build.cache_clear()
    return counts


def once(counts: Counter[str], *labels: str) -> bool:
    return {label: counts[label] for label in labels} == dict.fromkeys(labels, 1)


def score(model) -> float:
    return -float(model.lm_head.weight.norm())


def test_a_plan_locates_opens_and_builds_each_model_once(models, counted):
    plan_merge([models / "math", models / "code"], base_model=models / "base")
    assert once(
        counted, "planned", *(f"{did} {name}" for did in ("located", "header of") for name in ("base", "math", "code"))
    )
    built = {label: count for label, count in counted.items() if label.startswith("built")}
    assert built
    assert set(built.values()) == {1}, built


def test_a_header_is_read_again_where_a_model_is_located_again(models, counted):
    locations = [Location(str(models / "code"), models / "code", weight_names=("adapter_model.safetensors",))] * 2
    for location in locations:
        location.open_weights(models / "code" / "adapter_model.safetensors")
    assert counted["header of code"] == 1
    Location(str(models / "code"), models / "code").open_weights(models / "code" / "adapter_model.safetensors")
    assert counted["header of code"] == 2


def test_a_model_that_is_loaded_is_resolved_and_planned_once(models, counted, tmp_path):
    experts = [models / "math", models / "code"]
    AutoMergedModel.from_pretrained(experts, base_model=models / "base", merge_cache_dir=tmp_path)
    assert once(counted, "planned", "located base", "located math", "located code")
    AutoMergedModel.from_pretrained(experts, base_model=models / "base", merge_cache_dir=tmp_path)
    assert counted["planned"] == 1


def test_tuning_with_a_merge_at_its_end_plans_once(models, counted, tmp_path):
    grid = TuningGrid((0.0,), (0.8, 1.2), rounds=0)
    tune_lambdas([models / "math"], score, base_model=models / "base", grid=grid, output_dir=tmp_path / "merged")
    assert once(counted, "planned", "located base", "located math")


def test_a_comparison_plans_all_methods_at_once_and_each_expert_alone(models, counted):
    experts = [models / "math", models / "code"]
    methods = [AverageConfig(), AverageConfig(exclude=("lm_head*",))]
    compare_methods(experts, score, base_model=models / "base", methods=methods)
    assert once(counted, "located base", "located math", "located code")
    assert counted["planned"] == 1 + len(experts) + 1  # the method that merges other parameters has a plan of its own
