"""Heads stay with their models: an expert's own is kept apart, and a base's own is merged."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from families import CPU, assert_same_bits, load_cleanly, state
from merged_models import read_tensors
from neuromerge_hf import AutoMergedModel, MergeError, NeuroMergingConfig, merge
from neuromerge_hf.sources.heads import task_class
from tiny_models import load


def test_each_experts_head_is_kept_as_it_is(relatives_of, tmp_path: Path) -> None:
    relatives = relatives_of("bert")
    experts = [relatives.full(0), relatives.adapter(1), relatives.full(2)]
    merge(experts, tmp_path / "merged", base_model=relatives.base, **CPU)
    for number, expert in enumerate(experts):
        folder = tmp_path / "merged" / "heads" / expert.name
        config = transformers.AutoConfig.from_pretrained(folder)
        assert config.architectures == ["BertForSequenceClassification"]
        assert config.num_labels == relatives.family.labels[number]
        head = load_file(folder / "head.safetensors")
        own = relatives.trained(expert, number)
        own = state(own.merge_and_unload() if expert.name.startswith("adapter") else own)
        assert head.keys() == {"classifier.weight", "classifier.bias"}
        for name, tensor in head.items():
            assert_same_bits(tensor, own[name], name)


def test_the_architecture_is_the_experts_where_the_base_is_a_bare_backbone(relatives_of, tmp_path: Path) -> None:
    relatives = relatives_of("llama-tied")
    experts = [relatives.full(0), relatives.adapter(1)]
    transformers.LlamaModel.from_pretrained(relatives.base).save_pretrained(tmp_path / "bare")
    assert "layers.0.mlp.up_proj.weight" in read_tensors(tmp_path / "bare")
    merge(experts, tmp_path / "merged", base_model=tmp_path / "bare", **CPU)
    merge(experts, tmp_path / "usual", base_model=relatives.base, **CPU)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    merged = state(load_cleanly(transformers.LlamaForCausalLM, tmp_path / "merged"))
    for name, tensor in relatives.base_state(tmp_path / "usual").items():
        assert_same_bits(merged[name], tensor, name)


@pytest.fixture
def bare(relatives_of, tmp_path: Path) -> dict[str, Path]:
    """The backbones of two Llamas, without the head that the first ties and the second stores."""
    for name in ("llama-tied", "llama"):
        load(relatives_of(name).base).base_model.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in ("llama-tied", "llama")}


def test_a_head_is_not_left_out_of_its_model(bare, relatives_of, tmp_path: Path) -> None:
    tied, adapter = relatives_of("llama-tied").full(0), relatives_of("llama").adapter(0)
    ties = re.escape(f"{tied} ties lm_head.weight to model.embed_tokens.weight")
    with pytest.raises(MergeError, match=f"{ties}.*{bare['llama']} does not"):
        merge([tied], tmp_path / "merged", base_model=bare["llama"], **CPU)
    lacks = re.escape(f"lm_head.weight is in neither the adapter nor the base {bare['llama']}")
    with pytest.raises(MergeError, match=f"{adapter} was trained as LlamaForCausalLM .*{lacks}"):
        merge([adapter], tmp_path / "merged", base_model=bare["llama"], **CPU)


def test_a_head_of_its_own_is_kept_beside_a_base_that_would_tie_it(bare, relatives_of, tmp_path: Path) -> None:
    expert = relatives_of("llama").full(0)
    model = AutoMergedModel.from_pretrained(
        [expert], base_model=bare["llama-tied"], head=expert.name, merge_cache_dir=tmp_path / "cache", device="cpu"
    )
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert_same_bits(model.lm_head.weight, load(expert).lm_head.weight)


def test_an_adapter_of_a_model_with_images_is_not_taken_for_its_text_model() -> None:
    assert task_class("CAUSAL_LM", transformers.LlamaConfig()) is transformers.LlamaForCausalLM
    assert task_class("CAUSAL_LM", transformers.Llama4Config()) is None


def test_two_matrices_are_not_merged_with_one(relatives_of, tmp_path: Path) -> None:
    base, expert = relatives_of("llama").base, relatives_of("llama-tied").full(0)
    with pytest.raises(MergeError, match=re.escape(f"{expert} ties lm_head.weight to model.embed_tokens.weight")):
        merge([expert], tmp_path / "merged", base_model=base, **CPU)


def test_backbones_merge_into_a_base_with_a_head(relatives_of, tmp_path: Path) -> None:
    relatives = relatives_of("bert")
    config = transformers.BertConfig.from_pretrained(relatives.base)
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config)
    missing = model.bert.load_state_dict(relatives.base_state(), strict=False)
    assert missing.unexpected_keys == ["pooler.dense.weight", "pooler.dense.bias"]
    model.save_pretrained(tmp_path / "base")
    experts, base = [relatives.full(0), relatives.full(1)], tmp_path / "base"
    merge(experts, tmp_path / "merged", base_model=base, config=NeuroMergingConfig(), **CPU)
    config = NeuroMergingConfig(exclude=("pooler.*",))
    merge(experts, tmp_path / "want", base_model=relatives.base, config=config, **CPU)
    merged = state(load_cleanly(transformers.BertForMaskedLM, tmp_path / "merged"))
    want = relatives.base_state(tmp_path / "want")
    for key, tensor in merged.items():
        own = key.startswith("cls.")
        assert_same_bits(tensor, state(model)[key] if own else want[key.removeprefix("bert.")], key)
