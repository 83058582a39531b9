"""Models in memory merge like their folders, and nothing of a full model is copied."""

import copy
import gc
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from cards import card_of
from engine_runs import merged_weights
from families import Relatives
from neuromerge_hf import AutoMergedModel, MergeError, compare_methods, merge, merge_recipe, plan_merge, tune_lambdas
from neuromerge_hf.engine import passes
from neuromerge_hf.live import LiveModel
from neuromerge_hf.storage.memory import locate_live
from tiny_models import contents, load, load_adapted, save_adapter, save_bert, save_fine_tune, save_llamas

CPU: dict[str, Any] = {"device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = save_llamas(tmp_path_factory.mktemp("models"))
    save_fine_tune(root / "base", root / "chat", seed=3)
    return root


def differing(one: Path, other: Path) -> set[str]:
    """The files of two merges that are not the same, but for their reports, which `contents` leaves out."""
    a, b = contents(one), contents(other)
    return {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}


def test_models_in_memory_merge_as_their_folders_do(models: Path, tmp_path: Path) -> None:
    live = {"math": load(models / "math"), "code": load_adapted(models / "base", models / "code")}
    report = merge(live, tmp_path / "live", base_model=models / "base", **CPU)
    assert [expert.name for expert in report.experts] == ["math", "code"]
    merge({name: models / name for name in live}, tmp_path / "saved", base_model=models / "base", **CPU)
    assert differing(tmp_path / "live", tmp_path / "saved") == {"recipe.yaml"}


def test_the_base_can_be_in_memory(models: Path, tmp_path: Path) -> None:
    report = merge([models / "math"], tmp_path / "live", base_model=load(models / "base"), **CPU)
    merge([models / "math"], tmp_path / "saved", base_model=models / "base", **CPU)
    assert differing(tmp_path / "live", tmp_path / "saved") == {
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert "The base is a model in memory, which has no tokenizer" in str(report)


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "gpt-oss"])
def test_every_layout_and_tie_is_read_as_from_files(family: str, tmp_path: Path) -> None:
    relatives = Relatives(family, tmp_path)
    folder = relatives.full(1)
    live = load(folder)
    merge({"expert": live}, tmp_path / "live", base_model=relatives.base, **CPU)
    merge({"expert": folder}, tmp_path / "saved", base_model=relatives.base, **CPU)
    assert differing(tmp_path / "live", tmp_path / "saved") == {"recipe.yaml"}


def test_a_head_in_memory_is_kept(tmp_path: Path) -> None:
    base = save_bert(tmp_path / "base")
    expert = load(save_bert(tmp_path / "topics", "BertForSequenceClassification", num_labels=3))
    loaded = AutoMergedModel.from_pretrained(
        {"topics": expert}, base_model=base, head="topics", merge_cache_dir=tmp_path / "cache", **CPU
    )
    assert torch.equal(loaded.classifier.weight, expert.classifier.weight)


def test_transformers_own_adapters_are_taken(models: Path, tmp_path: Path) -> None:
    live = load(models / "base")
    live.load_adapter(str(models / "code"))
    merge({"code": live}, tmp_path / "live", base_model=models / "base", **CPU)
    merge({"code": models / "code"}, tmp_path / "saved", base_model=models / "base", **CPU)
    assert differing(tmp_path / "live", tmp_path / "saved") == {"recipe.yaml"}


def test_the_active_adapter_is_the_expert(models: Path, tmp_path: Path) -> None:
    other = save_adapter(models / "base", tmp_path / "other", seed=9)
    live = load_adapted(models / "base", models / "code")
    live.load_adapter(str(other), adapter_name="other")
    live.set_adapter("other")
    merge({"other": live}, tmp_path / "live", base_model=models / "base", **CPU)
    merge({"other": other}, tmp_path / "saved", base_model=models / "base", **CPU)
    assert differing(tmp_path / "live", tmp_path / "saved") == {"recipe.yaml"}
    live.base_model.set_adapter(["default", "other"])
    with pytest.raises(MergeError, match=r"the PeftModel in memory has the active adapters \['default', 'other'\]"):
        plan_merge([live], base_model=models / "base")


def test_weights_are_read_where_they_are(models: Path, tmp_path: Path) -> None:
    model = load(models / "math")
    plan = plan_merge([model], base_model=models / "base")
    location = plan.experts[0].location
    places = {tensor.data_ptr() for tensor in model.state_dict().values()}
    tensors = location.open_weights(tmp_path / "unused")
    assert tensors
    assert {tensor.tensor.data_ptr() for tensor in tensors.values()} <= places  # type: ignore[attr-defined]
    assert not list(location.folder.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_any_dtype_and_stride_is_read(dtype: torch.dtype, models: Path, tmp_path: Path) -> None:
    model = load(models / "math").to(dtype)
    model.save_pretrained(tmp_path / "math")
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.T.contiguous().T
    live, saved = ({"math": expert} for expert in (model, tmp_path / "math"))
    merge(live, tmp_path / "live", base_model=models / "base", **CPU)
    merge(saved, tmp_path / "saved", base_model=models / "base", **CPU)
    assert differing(tmp_path / "live", tmp_path / "saved") == {"recipe.yaml"}


def test_the_recipe_and_the_card_say_that_it_was_in_memory(models: Path, tmp_path: Path) -> None:
    model = load(models / "math")
    merge([model, models / "chat"], tmp_path / "merged", base_model=models / "base", **CPU)
    first, second = yaml.safe_load((tmp_path / "merged" / "recipe.yaml").read_text())["models"]
    assert first["id"] == "the LlamaForCausalLM in memory"
    assert first["in_memory"]
    assert "in_memory" not in second
    assert "cannot bring back the models that were in memory: `in-memory`." in card_of(tmp_path / "merged")[1]
    with pytest.raises(MergeError, match="The recipe names the LlamaForCausalLM in memory, which it cannot bring back"):
        merge_recipe(tmp_path / "merged" / "recipe.yaml", tmp_path / "again")


def test_the_hash_tells_models_apart(models: Path, tmp_path: Path) -> None:
    model, same = load(models / "math"), load(models / "math")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight[-1] += 1e-6
    hashes = [locate_live(LiveModel(each)).hashes() for each in (model, same, other)]
    assert hashes[0] == hashes[1]
    assert {name for name in hashes[0] if hashes[0][name] != hashes[2][name]} == {"model.safetensors"}

    def loaded(expert: Any) -> int:
        AutoMergedModel.from_pretrained([expert], base_model=models / "base", merge_cache_dir=tmp_path, **CPU)
        return len(list(tmp_path.glob("*/recipe.yaml")))

    assert [loaded(each) for each in (model, same, other)] == [1, 1, 2]


def test_a_model_that_changes_during_the_merge_is_refused(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(models / "math")
    run = passes.Passes.run

    def changed(self: Any, *arguments: Any) -> Any:
        with torch.no_grad():
            model.model.norm.weight.mul_(2)
        return run(self, *arguments)

    monkeypatch.setattr(passes.Passes, "run", changed)
    with pytest.raises(MergeError, match=r"model\.norm\.weight of the LlamaForCausalLM in memory has changed"):
        merge([model], tmp_path / "merged", base_model=models / "base", **CPU)
    assert not (tmp_path / "merged").exists()


def test_what_is_not_in_memory_is_refused(models: Path) -> None:
    config = load(models / "base").config
    with torch.device("meta"):
        offloaded = AutoModelForCausalLM.from_config(config)
    with pytest.raises(MergeError, match="in memory is not in memory but offloaded"):
        plan_merge([offloaded], base_model=models / "base")
    with pytest.raises(MergeError, match=r"or models of transformers and PEFT in memory\), .* not \[Linear"):
        plan_merge([torch.nn.Linear(2, 2)], base_model=models / "base")  # type: ignore[list-item]
    with pytest.raises(MergeError, match="models must be a list"):
        plan_merge(load(models / "math"), base_model=models / "base")  # type: ignore[arg-type]


def test_tuning_and_comparing_take_them(models: Path) -> None:
    model = load(models / "math")

    def evaluate(merged: Any) -> float:
        return -float(merged.lm_head.weight.norm())

    live = tune_lambdas([model, models / "code"], evaluate, base_model=models / "base", **CPU)
    saved = tune_lambdas([models / "math", models / "code"], evaluate, base_model=models / "base", **CPU)
    assert live.best == saved.best
    compared = compare_methods([model], evaluate, base_model=models / "base", methods=["ties"], device="cpu")
    assert list(compared.experts) == ["in-memory"]


def test_nothing_stays_behind(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = load(models / "math")
    plan = plan_merge([model, load_adapted(models / "base", models / "code")], base_model=models / "base")
    merged_weights(plan, tmp_path / "merged")
    assert len(list(tmp_path.glob("neuromerge-live-*"))) == 2
    del plan
    gc.collect()
    assert list(tmp_path.glob("neuromerge-live-*")) == []
