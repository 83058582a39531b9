"""What a merge writes is finite, or nothing is written: the error names the parameter and what to do."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from changes import DOWN, EMBEDDINGS, change_json, change_tensors, says
from neuromerge_hf import (
    AutoMergedModel,
    AverageConfig,
    MergeError,
    NeuroMergingConfig,
    PCBConfig,
    TaskArithmeticConfig,
    TuningGrid,
    merge,
    tune_lambdas,
)
from neuromerge_hf.storage.finite import dtype_that_holds, is_finite
from tiny_models import save_adapter, save_classifiers, save_llamas

NORM = "model.norm.weight"
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return save_llamas(tmp_path / "models")


def refused(tmp_path: Path, *args: object, **kwargs: object) -> str:
    """Merge, expect a `MergeError`, check that nothing is left behind, and return the message."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MergeError) as caught:
        merge(*args, tmp_path / "merged", **kwargs)
    assert sorted(tmp_path.rglob("*")) == before
    return str(caught.value)


def put(folder: Path, name: str, value: float) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[5] = value

    change_tensors(folder / "model.safetensors", change)


@pytest.mark.parametrize(("dtype", "value", "holds"), [("float16", 7e4, "bfloat16"), ("bfloat16", 3.4e38, "float32")])
def test_a_merged_value_that_the_dtype_does_not_hold_is_refused(
    models: Path, tmp_path: Path, dtype: str, value: float, holds: str
) -> None:
    for name in ("base", "math"):
        put(models / name, DOWN, value)
    message = refused(tmp_path, [models / "math"], base_model=models / "base", dtype=dtype, config=AverageConfig())
    assert says(message, DOWN, dtype, f'dtype="{holds}"', f"{value:.6g}")
    merge([models / "math"], tmp_path / "held", base_model=models / "base", dtype=holds, config=AverageConfig())
    assert is_finite(load_file(tmp_path / "held" / "model.safetensors")[DOWN])


def test_a_copied_value_that_the_dtype_does_not_hold_is_refused(models: Path, tmp_path: Path) -> None:
    put(models / "base", EMBEDDINGS, -7e4)
    message = refused(tmp_path, [models / "code"], base_model=models / "base", dtype="float16")
    assert says(message, EMBEDDINGS, "float16 ends at 65504", 'dtype="bfloat16"')


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_a_copied_parameter_that_is_not_finite_is_named_with_its_file(
    models: Path, tmp_path: Path, value: float
) -> None:
    put(models / "base", EMBEDDINGS, value)
    message = refused(tmp_path, [models / "code"], base_model=models / "base")
    assert says(message, EMBEDDINGS, "base model", "NaN or an infinity", models / "base" / "model.safetensors")


@pytest.mark.parametrize("experts", [["math"], ["code"]])
@pytest.mark.parametrize("lambdas", [{"lambda_orthogonal": 1e300}, {"lambda_parallel": -1e300}])
def test_lambdas_that_leave_no_finite_weight_are_refused(
    models: Path, tmp_path: Path, experts: list[str], lambdas: dict[str, float]
) -> None:
    config = NeuroMergingConfig(density=1, **lambdas)
    message = refused(tmp_path, [models / name for name in experts], base_model=models / "base", config=config)
    assert says(message, "would not be finite", "float32", "smaller lambda")


def test_a_scale_that_leaves_no_finite_weight_is_refused(models: Path, tmp_path: Path) -> None:
    config = TaskArithmeticConfig(scale=1e300)
    message = refused(tmp_path, [models / "math"], base_model=models / "base", config=config)
    assert says(message, "would not be finite", "scale")


def test_the_scaling_of_an_adapter_that_exceeds_float32_is_named(models: Path, tmp_path: Path) -> None:
    change_json(models / "code" / "adapter_config.json", lora_alpha=1e300)
    message = refused(tmp_path, [models / "code"], base_model=models / "base")
    assert says(message, "lora_alpha", "exceeds float32", models / "code" / "adapter_model.safetensors")


def test_an_adapter_whose_product_exceeds_float32_is_not_called_damaged(models: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for tensor in tensors.values():
            tensor.fill_(1e30)

    change_tensors(models / "code" / "adapter_model.safetensors", change)
    message = refused(tmp_path, [models / "code", models / "math"], base_model=models / "base")
    assert says(message, "code", "exceeds float32", models / "code" / "adapter_model.safetensors")
    assert "NaN" not in message


def test_a_base_in_float64_that_exceeds_float32_is_not_called_damaged(models: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[DOWN] = tensors[DOWN].double()
        tensors[DOWN][1, 2] = 1e300

    change_tensors(models / "base" / "model.safetensors", change)
    message = refused(tmp_path, [models / "math"], base_model=models / "base")
    assert says(message, DOWN, "base model", "exceeds float32")
    merge([models / "math"], tmp_path / "kept", base_model=models / "base", config=AverageConfig(exclude=(DOWN,)))
    assert load_file(tmp_path / "kept" / "model.safetensors")[DOWN][1, 2] == 1e300


def test_a_model_that_is_all_nan_is_named_by_a_method_that_finds_thresholds(models: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for tensor in tensors.values():
            tensor.fill_(NAN)

    change_tensors(models / "math" / "model.safetensors", change)
    message = refused(tmp_path, [models / "math"], base_model=models / "base", config=PCBConfig())
    assert says(message, "of math holds a NaN or an infinity")


@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_a_head_that_is_not_finite_is_refused_before_anything_is_merged(tmp_path: Path, value: float) -> None:
    models = save_classifiers(tmp_path / "models")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["classifier.weight"].fill_(value)

    change_tensors(models / "topics" / "model.safetensors", change)
    message = refused(tmp_path, [models / "topics", models / "moods"], base_model=models / "encoder")
    assert says(message, "classifier.weight of topics's own head", models / "topics" / "model.safetensors")


def test_an_adapters_own_head_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    models = save_classifiers(tmp_path / "models")
    adapter = save_adapter(
        models / "encoder",
        models / "spam",
        seed=7,
        model_class="BertForSequenceClassification",
        num_labels=2,
        task_type="SEQ_CLS",
        target_modules=["query"],
    )

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.classifier.weight"][0, 0] = NAN

    change_tensors(adapter / "adapter_model.safetensors", change)
    message = refused(tmp_path, [adapter, models / "moods"], base_model=models / "encoder")
    assert says(message, "classifier.weight of spam's own head", adapter / "adapter_model.safetensors")


@pytest.mark.parametrize("value", [INFINITY, -INFINITY])
def test_an_infinity_in_a_buffer_of_the_base_is_kept(models: Path, tmp_path: Path, value: float) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.mask"] = torch.tensor([0.0, value])

    change_tensors(models / "base" / "model.safetensors", change)
    merge([models / "math"], tmp_path / "merged", base_model=models / "base", dtype="float16")
    kept = load_file(tmp_path / "merged" / "model.safetensors")["model.layers.0.self_attn.mask"]
    assert kept.tolist() == [0.0, value]


@pytest.mark.parametrize("value", [NAN, 7e4])
def test_a_buffer_that_is_damaged_or_too_large_is_refused(models: Path, tmp_path: Path, value: float) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.mask"] = torch.tensor([-INFINITY, value])

    change_tensors(models / "base" / "model.safetensors", change)
    message = refused(tmp_path, [models / "math"], base_model=models / "base", dtype="float16")
    assert says(message, "model.layers.0.self_attn.mask")


def test_tuning_refuses_lambdas_that_the_live_model_cannot_hold(models: Path, tmp_path: Path) -> None:
    grid = TuningGrid(parallel=(0.0,), orthogonal=(1e9,), rounds=0)
    with pytest.raises(MergeError) as caught:
        tune_lambdas(
            [models / "math"],
            lambda model: 1.0,
            grid=grid,
            base_model=models / "base",
            dtype="float16",
            work_dir=tmp_path,
        )
    assert says(str(caught.value), "float16", "lambda_orthogonal", "grid=")


def test_loading_in_a_dtype_that_does_not_hold_the_weights_is_refused(models: Path, tmp_path: Path) -> None:
    for name in ("base", "math"):
        put(models / name, NORM, 7e4)
    options = {"base_model": models / "base", "merge_cache_dir": tmp_path / "cache"}
    with pytest.raises(MergeError) as caught:
        AutoMergedModel.from_pretrained([models / "math"], dtype=torch.float16, **options)
    assert says(str(caught.value), NORM, "not finite in float16", "bfloat16")
    AutoMergedModel.from_pretrained([models / "math"], dtype=torch.bfloat16, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_one_value_that_is_not_finite_is_found_anywhere(dtype: torch.dtype, value: float) -> None:
    for count in (1, 7, 8, 33, 100, 4097):
        values = torch.zeros(count, dtype=dtype)
        assert is_finite(values)
        for place in {0, count // 2, count - 1}:
            assert not is_finite(values.index_fill(0, torch.tensor(place), value))


def test_numbers_of_other_kinds_are_finite_or_not() -> None:
    assert is_finite(torch.tensor([1, 2]))
    assert is_finite(torch.empty(0, 3))
    assert is_finite(torch.ones(2, dtype=torch.complex64))
    assert not is_finite(torch.full((2,), complex(0, NAN)))
    assert not is_finite(torch.tensor([1.0, NAN]).to(torch.float8_e4m3fn))


def test_the_smallest_dtype_that_holds_a_number_is_named() -> None:
    found = [dtype_that_holds(number) for number in (65504, 65520, 3.3895e38, 3.4e38, 1e39)]
    assert found == ["float16", "bfloat16", "bfloat16", "float32", "float64"]
