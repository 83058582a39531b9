"""A head is merged or kept if a config.json does not name the class that has it, or the model is refused."""

import json
import re
from pathlib import Path

import pytest
import torch

from changes import change_json, change_tensors, says
from neuromerge_hf import AutoMergedModel, MergeError, merge, plan_merge
from tiny_models import contents, save_adapter, save_bert, save_fine_tune, save_llama

CPU = {"device": "cpu", "threads": 1}
LLAMA, TASK = "LlamaForCausalLM", "BertForSequenceClassification"


def without_class(folder: Path, named: list[str] | None = None) -> Path:
    change_json(folder / "config.json", architectures=named)
    return folder


@pytest.fixture
def llamas(tmp_path: Path) -> Path:
    base = save_llama(tmp_path / "base")
    save_fine_tune(base, tmp_path / "math", seed=1)
    save_adapter(base, tmp_path / "code", seed=2, modules_to_save=["lm_head"], target_modules=["q_proj"])
    merge([tmp_path / "math", tmp_path / "code"], tmp_path / "want", base_model=base, **CPU)
    return tmp_path


@pytest.mark.parametrize("named", [None, ["LLaMAForCausalLM"]])
@pytest.mark.parametrize("unnamed", [["base"], ["base", "math"], ["math"]])
def test_the_head_is_merged_as_if_the_class_were_named(llamas, unnamed, named) -> None:
    for name in unnamed:
        without_class(llamas / name, named)
    report = merge([llamas / "math", llamas / "code"], llamas / "merged", base_model=llamas / "base", **CPU)
    assert "lm_head.weight" in report.by_neuron.names + report.by_matrix.names
    weights = contents(llamas / "merged")["model.safetensors"]
    assert weights == contents(llamas / "want")["model.safetensors"]
    assert json.loads((llamas / "merged" / "config.json").read_text())["architectures"] == [LLAMA]


@pytest.fixture
def berts(tmp_path: Path) -> Path:
    base = save_bert(tmp_path / "base")
    masked = save_bert(tmp_path / "masked", "BertForMaskedLM")
    save_fine_tune(masked, tmp_path / "poems", seed=1)
    save_fine_tune(base, tmp_path / "topics", seed=2, model_class=TASK, num_labels=3)
    save_fine_tune(base, tmp_path / "tags", seed=3, model_class="BertForTokenClassification", num_labels=5)
    return tmp_path


@pytest.mark.parametrize(("name", "labels"), [("topics", 3), ("tags", 5)])
def test_the_head_of_an_expert_without_a_class_is_kept(berts, name, labels) -> None:
    expert = without_class(berts / name)
    loaded = AutoMergedModel.from_pretrained(
        [expert], base_model=berts / "base", head=name, merge_cache_dir=berts / "cache", device="cpu"
    )
    assert loaded.classifier.weight.shape[0] == labels


def test_an_expert_of_several_possible_classes_is_refused(berts) -> None:
    without_class(berts / "poems")
    with pytest.raises(MergeError) as caught:
        plan_merge([berts / "poems"], base_model=berts / "base")
    config = berts / "poems" / "config.json"
    assert says(str(caught.value), config, "architectures", "BertForMaskedLM", "BertLMHeadModel", "Name the class")


def test_a_base_of_several_possible_classes_is_refused_only_if_an_expert_has_its_head(berts) -> None:
    base = without_class(berts / "masked")
    with pytest.raises(MergeError) as caught:
        plan_merge([berts / "poems"], base_model=base)
    assert says(str(caught.value), berts / "poems", base, "cls.predictions", "names no class", "architectures")
    plan = plan_merge([berts / "topics"], base_model=base)
    assert {"classifier.bias", "classifier.weight"} <= plan.experts[0].head.tensors.keys()


def test_a_head_that_contradicts_its_own_config_is_refused(llamas) -> None:
    file = llamas / "math" / "model.safetensors"
    change_tensors(file, lambda it: it.update({"lm_head.weight": torch.ones(44, 32)}))
    message = re.escape(f"lm_head.weight is (44, 32) in {file}, but (40, 32) by the sizes in the config.json beside it")
    with pytest.raises(MergeError, match=message):
        plan_merge([llamas / "math"], base_model=llamas / "base")
