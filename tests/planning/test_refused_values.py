"""Weights and arguments that cannot be merged with are refused, with the value and what is possible."""

from pathlib import Path

import pytest
import torch

from changes import DOWN, change_json, change_tensors, says
from neuromerge_hf import MergeError, NeuroMergingConfig, merge, plan_merge, tune_lambdas


@pytest.mark.parametrize("density", [0.2, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("who", ["base", "math"])
def test_a_weight_that_is_not_finite_is_named_with_its_file(models, copied, refused, who, value, density):
    def damage(tensors):
        tensors[DOWN][3, 5] = value

    folder = copied(who)
    change_tensors(folder / "model.safetensors", damage)
    base = folder if who == "base" else models / "base"
    expert = folder if who == "math" else models / "math"
    config = NeuroMergingConfig(density=density)
    message = refused([models / "code", expert], planned=False, base_model=base, config=config)
    assert says(message, DOWN, "NaN or an infinity", folder / "model.safetensors")
    assert says(message, "base" if who == "base" else "math")


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_a_lora_factor_that_is_not_finite_is_named_with_its_file(models, copied, refused, side):
    def damage(tensors):
        tensors[f"base_model.model.model.layers.1.mlp.down_proj.{side}.weight"][1, 2] = float("nan")

    adapter = copied("code")
    change_tensors(adapter / "adapter_model.safetensors", damage)
    message = refused([adapter], base_model=models / "base", planned=False)
    assert says(message, "model.layers.1.mlp.down_proj", "NaN or an infinity", adapter / "adapter_model.safetensors")


def test_a_quantised_model_is_refused(models, copied, refused):
    expert = copied("math")
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    change_json(expert / "config.json", quantization_config=quantization)
    message = refused([expert], base_model=models / "base")
    assert says(message, expert, "quantised", "bitsandbytes", "float32, float16 or bfloat16")


def test_integer_weights_are_refused(models, copied, refused):
    def quantise(tensors):
        tensors[DOWN] = tensors[DOWN].to(torch.int8)

    expert = copied("math")
    change_tensors(expert / "model.safetensors", quantise)
    message = refused([expert], base_model=models / "base")
    assert says(message, DOWN, "int8", "float32", expert / "model.safetensors", models / "base", "Quantised")


@pytest.mark.parametrize("experts", [[], (), "math", Path("math"), None, {"math": 3}], ids=repr)
def test_models_must_be_a_list(models, refused, experts):
    message = refused(experts, base_model=models / "base")
    shown = {"[]": "empty", "()": "empty", "{'math': 3}": "(3,)"}.get(repr(experts), repr(experts))
    assert says(message, "models must be a list of at least one", shown)


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 2, 1.01, float("nan"), float("inf"), "x", "0.2", None, True, [0.2]])
def test_a_density_out_of_range_is_refused(density):
    with pytest.raises(MergeError) as caught:
        NeuroMergingConfig(density=density)
    assert says(str(caught.value), "0 < density <= 1", repr(density))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "x", None, True])
@pytest.mark.parametrize("name", ["lambda_parallel", "lambda_orthogonal"])
def test_a_lambda_that_is_no_number_is_refused(name, value):
    with pytest.raises(MergeError) as caught:
        NeuroMergingConfig(**{name: value})
    assert says(str(caught.value), name, "finite number", repr(value))


@pytest.mark.parametrize("exclude", ["lm_head*", [3], None, 3], ids=repr)
def test_exclude_must_be_a_sequence_of_patterns(exclude):
    with pytest.raises(MergeError) as caught:
        NeuroMergingConfig(exclude=exclude)
    assert says(str(caught.value), "exclude", "patterns", repr(exclude))


def test_a_pattern_that_matches_nothing_is_refused(models, refused):
    config = NeuroMergingConfig(exclude=("lm_head*", "decoder.*"))
    message = refused([models / "math"], base_model=models / "base", config=config)
    assert says(message, "decoder.*", "matches no parameter", models / "base", "lm_head.weight")


def test_excluding_everything_is_refused(models, refused):
    message = refused([models / "math"], base_model=models / "base", config=NeuroMergingConfig(exclude=("*",)))
    assert says(message, "nothing to merge")


@pytest.mark.parametrize("dtype", ["float17", "int8", torch.int64, "nn", None, 3], ids=repr)
def test_a_dtype_that_is_no_floating_point_is_refused(models, refused, dtype):
    message = refused([models / "math"], base_model=models / "base", dtype=dtype)
    assert says(message, "dtype must be", '"bfloat16"', "'int64'" if dtype is torch.int64 else repr(dtype))


@pytest.mark.parametrize("size", ["5 apples", "GB", -1, 0, None], ids=repr)
def test_a_shard_size_that_is_none_is_refused(models, refused, size):
    message = refused([models / "math"], planned=False, base_model=models / "base", max_shard_size=size)
    assert says(message, "max_shard_size", repr(size), "5GB")


@pytest.mark.parametrize("base_model", ["base", "nowhere"])
def test_settings_and_models_are_refused_together(models, tmp_path, base_model):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    options = {"base_model": models / base_model, "max_shard_size": "5XX", "device": "abacus"}
    problems = [f"{tmp_path / 'full'} exists", "max_shard_size must be a size", "device='abacus' cannot be used"]
    problems += ["./missing is not a folder", *(["nowhere is not a folder"] if base_model == "nowhere" else [])]
    experts = [models / "math", "./missing"]
    calls = {
        "merge": lambda: merge(experts, tmp_path / "full", **options),
        "plan": lambda: plan_merge(experts, output_dir=tmp_path / "full", **options),
        "tune": lambda: tune_lambdas(experts, len, output_dir=tmp_path / "full", **options),
    }
    for name, call in calls.items():
        with pytest.raises(MergeError) as caught:
            call()
        assert len(caught.value.problems) == len(problems), (name, caught.value)
        for problem, found in zip(problems, caught.value.problems, strict=True):
            assert says(found, problem)


@pytest.mark.parametrize("device", ["tpu-ish", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(models, refused, device):
    message = refused([models / "math"], planned=False, base_model=models / "base", device=device)
    assert says(message, "device", device)
