"""What users type first: it works, or one sentence says at once what to type instead."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from neuromerge_hf import (
    AutoMergedModel,
    AverageConfig,
    DARETIESConfig,
    MergeError,
    NeuroMergingConfig,
    TaskArithmeticConfig,
    TIESConfig,
    compare_methods,
    merge,
    merge_recipe,
    plan_merge,
    tune_lambdas,
)
from neuromerge_hf.folder.report import load_report
from tiny_models import contents, save_adapter, save_bert, save_fine_tune, save_llama

CPU = {"device": "cpu"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("first")
    base = save_llama(root / "base")
    for seed, name in enumerate(("math", "code"), start=1):
        save_fine_tune(base, root / name, seed=seed)
    save_adapter(base, root / "lora", seed=3)
    return root


@pytest.fixture
def no_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be merged."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a merge began")

    monkeypatch.setattr("neuromerge_hf.loading.auto.merge_spec", fail)


# ----------------------------------------------------------------------------------------- arguments of from_pretrained


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"density": 0.1}, "Did you mean config=NeuroIsoConfig(density=0.1)?"),
        ({"drop_rate": 0.5}, "Did you mean config=DARETIESConfig(drop_rate=0.5)?"),
        ({"weights": (1, 2)}, "Did you mean config=AverageConfig(weights=(1, 2))?"),
        ({"overwrite": True}, "it is one of `merge`"),
        ({"base": "base"}, "Did you mean 'base_model'?"),
        ({"device_mapp": "auto"}, "Did you mean 'device_map'?"),
        ({"subfolder": "x"}, 'write the folder into the id: "owner/name/folder"'),
        ({"quantisation_config": None}, "Did you mean 'quantization_config'?"),
        ({"nonsense": 1}, "has no argument 'nonsense'."),
    ],
)
@pytest.mark.usefixtures("no_merge")
def test_an_argument_that_nobody_takes_is_found_before_anything_is_merged(models, tmp_path, argument, message):
    experts, options = [models / "math"], {"base_model": models / "base", "cache_dir": tmp_path, **CPU}
    with pytest.raises(TypeError) as caught:
        AutoMergedModel.from_pretrained(experts, **options, **argument)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_arguments_of_the_class_and_the_configuration_are_passed_on(models, tmp_path):
    base = save_bert(tmp_path / "bert")
    expert = save_fine_tune(base, tmp_path / "expert", seed=1)
    model = AutoMergedModel.from_pretrained(
        [expert],
        base_model=base,
        cache_dir=tmp_path / "cache",
        output_attentions=True,
        attn_implementation="eager",
        low_cpu_mem_usage=True,
        **CPU,
    )
    assert model.config.output_attentions


def test_an_unknown_argument_of_a_finished_merge_is_found_too(models, tmp_path):
    folder = merge([models / "math"], tmp_path / "merged", base_model=models / "base", **CPU).output_dir
    with pytest.raises(TypeError, match="has no argument 'densty'"):
        AutoMergedModel.from_pretrained(folder, densty=0.5)


def test_every_argument_that_transformers_takes_is_known():
    """Its source says which: a new one must be added to the table."""
    import inspect
    import re

    from transformers import PreTrainedModel

    from neuromerge_hf.loading.arguments import INSTEAD, OF_TRANSFORMERS

    function = PreTrainedModel.from_pretrained
    named = [name for name, each in inspect.signature(function).parameters.items() if each.kind is each.KEYWORD_ONLY]
    popped = re.findall(r'kwargs\.(?:pop|get)\("([a-z]\w*)"', inspect.getsource(function.__func__))
    ours = {"cache_dir", "revision"}
    assert {*named, *popped} - ours <= {*OF_TRANSFORMERS, *INSTEAD}


# --------------------------------------------------------------------------------------------------------------- config


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
    assert list(found.methods) == ["ties", "average", "ties, density 0.5"] or len(found.methods) == 3
    with pytest.raises(MergeError, match="methods must be a list"):
        compare_methods(experts, evaluate, base_model=models / "base", methods="ties")


@pytest.mark.parametrize("function", [tune_lambdas, compare_methods])
def test_a_missing_evaluation_is_found_at_once(models, function):
    started = time.perf_counter()
    with pytest.raises(MergeError, match="evaluate must be a function"):
        function([models / "math"], None, base_model=models / "base")
    assert time.perf_counter() - started < 5


# ---------------------------------------------------------------------------------------------------------------- names


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
    options = {"base_model": models / "base", "cache_dir": tmp_path, **CPU}
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


# -------------------------------------------------------------------------------------------------------------- weights


def rows_of(models: Path, name: str) -> dict[str, torch.Tensor]:
    return {key: value.double() for key, value in load_file(models / name / "model.safetensors").items()}


@pytest.mark.parametrize(
    "config",
    [
        TaskArithmeticConfig(scale=0.7, weights=(1, 3)),
        TIESConfig(density=1, scale=0.8, weights=(1, 3)),
        DARETIESConfig(drop_rate=0, density=1, weights=(1, 3)),
    ],
)
def test_experts_have_weights_in_the_sum_the_votes_and_the_mean(models, tmp_path, config):
    merge([models / "math", models / "code"], tmp_path / "merged", base_model=models / "base", config=config, **CPU)
    merged, base = rows_of(tmp_path, "merged"), rows_of(models, "base")
    one, other = (rows_of(models, name) for name in ("math", "code"))
    weights = torch.tensor([1.0, 3.0]).double()
    for name, before in base.items():
        changes = torch.stack([one[name] - before, other[name] - before])
        shape = (2,) + (1,) * before.dim()
        weighted = changes * weights.view(shape)
        if isinstance(config, TaskArithmeticConfig):
            want = weighted.sum(0)
        else:
            agrees = (weighted.sign() == weighted.sum(0).sign()) & (weighted != 0)
            want = (weighted * agrees).sum(0) / (agrees * weights.view(shape)).sum(0).clamp(min=1)
        assert torch.allclose(merged[name], before + config.scale * want, atol=1e-6)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "average"])
def test_there_is_a_weight_for_each_expert(models, method):
    with pytest.raises(MergeError, match="weights has 3 entries"):
        plan_merge(
            [models / "math", models / "code"],
            base_model=models / "base",
            config={"method": method, "weights": (1, 2, 3)},
        )


# ----------------------------------------------------------------------------------------------------------------- YAML


def write(path: Path, content: object) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


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


def mergekit(models: Path, method: str, *parameters: dict, **content: object) -> dict:
    entries = [
        {"model": str(models / name), "parameters": each}
        for name, each in zip(("math", "code"), parameters or ({}, {}), strict=True)
    ]
    return {"merge_method": method, "base_model": str(models / "base"), "models": entries, **content}


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


# --------------------------------------------------------------------------------------------------------- command line


def command(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "neuromerge_hf", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, **options)


def test_the_module_is_the_command_line():
    from neuromerge_hf import __version__

    assert command("--version").stdout == f"neuromerge {__version__}\n"
    assert command("-h").stdout == command("--help").stdout
    assert "neuromerge merge [OPTIONS]" in command("merge", "-h").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "a", "-o", "{full}"], "exists and is not empty"),
        (["merge", "a", "-o", "new", "--method", "tiess"], "'tiess' is not one of"),
        (["compare", "a", "--eval", "x:y", "--method", "tiess"], "'tiess' is not one of"),
        (["merge", "-o", "new"], "Name the models to merge"),
        (["merge", "a", "-o", "{full}/file"], "is a file"),
        (["merge", "a", "-o", "new", "--config", "b.yaml"], "and not both"),
        (["merge", "a", "-o", "new", "--densty", "1"], "No such option"),
    ],
)
def test_a_mistake_on_the_command_line_is_found_before_torch_is_imported(tmp_path, arguments, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    words = [each.format(full=tmp_path / "full") for each in arguments]
    code = f"import sys\nsys.argv = ['neuromerge', *{words!r}]\nfrom neuromerge_hf.cli import app\n"
    code += "try:\n    app()\nfinally:\n    assert 'torch' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode in (1, 2), found.stderr
    assert "AssertionError" not in found.stderr
    assert message in " ".join(found.stderr.replace("│", " ").split())


def test_the_command_line_takes_a_file_and_a_method_in_any_case(models, tmp_path):
    path = write(tmp_path / "kit.yml", mergekit(models, "ties"))
    done = command("merge", "--config", path, "-o", tmp_path / "merged", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert load_report(tmp_path / "merged").method == "ties"
    experts = [models / "math", models / "code"]
    planned = command("plan", *experts, "--base-model", models / "base", "--method", "TIES", "--weights", "1,2")
    assert planned.returncode == 0, planned.stderr


def test_neuromerging_is_tuned_by_a_dictionary(models):
    found = tune_lambdas(
        [models / "math", models / "code"],
        lambda model: -float(model.lm_head.weight.norm()),
        base_model=models / "base",
        config={"density": 0.5},
    )
    assert found.config.density == 0.5
    assert type(found.config) is NeuroMergingConfig


# -------------------------------------------------------------------------------------------------- what cells show


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
    assert repr(report) == "<MergeReport: Merged 2 experts into base>"


def test_plan_and_comparison_are_printed_as_json(models, tmp_path):
    experts = [models / "math", models / "code"]
    found = json.loads(command("plan", *experts, "--base-model", models / "base", "--json").stdout)
    assert [expert["name"] for expert in found["experts"]] == ["math", "code"]
    assert found["costs"]["bytes_written"] == plan_merge(experts, base_model=models / "base").bytes_written
    (tmp_path / "score.py").write_text("def size(model):\n    return 1.0\n")
    words = ["compare", *experts, "--base-model", models / "base", "--eval", "score:size", "--method", "ties", "--json"]
    compared = json.loads(command(*words, cwd=tmp_path).stdout)
    assert compared["winner"] is None
    assert compared["models"][-1]["name"] == "ties"
