"""`merge` from end to end on a tiny model of each family, against the reference and against the experts themselves.

Merged models are loaded by plain transformers. What the reference merges is what transformers and PEFT load, so names
in files, tied weights and converted weights are checked on the way.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from all_families import MORE_FAMILIES
from families import CPU, FAMILIES, GIVES_BACK, assert_merged_as_reference, assert_same_bits, load_cleanly, state
from merged_models import load_merged
from neuromerge_hf import NeuroMergingConfig, merge
from tiny_models import contents

VARIANTS = {
    "rslora": ("llama", {"use_rslora": True}),
    "rank_pattern": ("llama", {"rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\.up_proj": 2}}),
    "alpha_pattern": (
        "llama",
        {"alpha_pattern": {"q_proj": 5, "0.self_attn.v_proj": 1}, "rank_pattern": {"k_proj": 1}},
    ),
    "rslora with patterns": (
        "llama",
        {"use_rslora": True, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 3}},
    ),
    "bias of Linear": ("bert", {"bias": "all"}),
    "bias of LoRA only": ("bert", {"bias": "lora_only"}),
    "bias of Conv1D": ("gpt2", {"bias": "all"}),
    "bias of Conv2d": ("vit", {"bias": "all"}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding, its bias too": ("llama", {"target_modules": ["embed_tokens", "lm_head"], "bias": "all"}),
    "embedding of positions": ("gpt2", {"target_modules": ["wpe", "c_attn"]}),
    "saved norms": ("llama", {"modules_to_save": ["norm", "input_layernorm"]}),
    "saved embedding and head": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "LoRA of the head": ("llama", {"target_modules": ["lm_head", "o_proj"]}),
    "regular expression": ("llama", {"target_modules": r".*\.1\..*_proj"}),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "saved classifier": ("vit", {"modules_to_save": ["classifier"]}),
    "bias and saved modules": ("vit", {"bias": "all", "modules_to_save": ["classifier", "layernorm"]}),
    "router": ("mixtral", {"target_modules": ["q_proj"], "modules_to_save": ["gate"]}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_lora_variant_is_given_back(variant: str, relatives_of, tmp_path: Path) -> None:
    name, options = VARIANTS[variant]
    relatives = relatives_of(name)
    adapter = relatives.adapter(1, tmp_path / "adapter", **options)
    report = merge([adapter], tmp_path / "merged", base_model=relatives.base, config=GIVES_BACK, **CPU)
    model = relatives.trained(adapter, 1)
    merged = load_merged(relatives, tmp_path / "merged", adapter, 1)
    torch.testing.assert_close(relatives.output(merged), relatives.output(model), rtol=1e-5, atol=1e-5)
    want = state(model.merge_and_unload())
    for parameter, got in state(merged).items():
        torch.testing.assert_close(got, want[parameter], rtol=1e-5, atol=1e-6)
    assert len(report.merged) == len(relatives.expert_state(adapter, 1))


MIXED, ALL_FULL, ALL_LORA = ("full", "lora", "full"), ("full",) * 3, ("lora",) * 3


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        *((name, MIXED) for name in FAMILIES),
        *((name, kinds) for name in ("bert", "llama-tied", "gpt-oss") for kinds in (ALL_FULL, ALL_LORA)),
        *((name, MIXED[:2]) for name in MORE_FAMILIES),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_experts_are_merged_as_the_reference_does(name: str, kinds, relatives_of, tmp_path: Path) -> None:
    relatives = relatives_of(name)
    experts = [relatives.expert(kind, number) for number, kind in enumerate(kinds)]
    config = NeuroMergingConfig()
    report = merge(experts, tmp_path / "merged", base_model=relatives.base, config=config, **CPU)
    base = relatives.base_state()
    assert_merged_as_reference(
        state(relatives.load_cleanly(tmp_path / "merged")),
        report,
        base,
        relatives.experts_state(experts),
        relatives.family.neurons_of(base),
        exact_task_vectors="lora" not in kinds,
    )
    assert (report.density, report.lambda_parallel) == (0.2, 0.0)
    assert report.lambda_orthogonal == 1 / (1 - report.sigma)
    assert report.sigma == max(expert.sigma for expert in report.experts)


def test_both_parts_are_merged_as_the_reference_does(relatives_of, tmp_path: Path) -> None:
    relatives = relatives_of("gpt2")
    experts = [relatives.full(0), relatives.full(1), relatives.full(2)]
    config = NeuroMergingConfig(density=0.6, lambda_parallel=0.7, lambda_orthogonal=1.3)
    report = merge(experts, tmp_path / "merged", base_model=relatives.base, config=config, **CPU)
    base = relatives.base_state()
    merged = relatives.base_state(tmp_path / "merged")
    neurons = relatives.family.neurons_of(base)
    assert_merged_as_reference(merged, report, base, relatives.experts_state(experts), neurons)
    assert (report.lambda_parallel, report.lambda_orthogonal) == (0.7, 1.3)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_merged_directory_is_a_plain_model_and_a_recipe(name: str, relatives_of, tmp_path: Path) -> None:
    relatives = relatives_of(name)
    experts = [relatives.full(0), relatives.adapter(1)]
    merged = tmp_path / "merged"
    report = merge(experts, merged, base_model=relatives.base, **CPU)
    load_cleanly(relatives.family.base_class, merged)
    config = json.loads((merged / "config.json").read_text())
    assert config["architectures"] == [relatives.family.base_class.__name__]
    assert {**config, "transformers_version": ""} == {
        **json.loads((relatives.base / "config.json").read_text()),
        "transformers_version": "",
    }
    files = contents(merged)
    heads = {f"heads/{expert.name}/{file}" for expert in experts for file in ("config.json", "head.safetensors")}
    assert files.keys() == {*contents(relatives.base), "recipe.yaml", *(heads if relatives.family.labels else ())}
    assert [expert.head for expert in report.experts] == [
        ["classifier.bias", "classifier.weight"] if relatives.family.labels else []
    ] * 2
    for file, content in files.items():
        assert file == "recipe.yaml" or b"neuromerg" not in content.lower()
    headers = []
    for folder in (merged, relatives.base):
        with safe_open(folder / "model.safetensors", "pt") as file:
            headers.append((set(file.keys()), file.metadata()))
    assert headers[0] == headers[1]


def test_integers_and_what_nobody_changes_are_copied_bit_for_bit(relatives_of, tmp_path: Path) -> None:
    relatives = relatives_of("resnet")
    merge([relatives.full(0), relatives.adapter(1)], tmp_path / "full", base_model=relatives.base, **CPU)
    report = merge([relatives.adapter(0), relatives.adapter(1)], tmp_path / "lora", base_model=relatives.base, **CPU)
    folders = (relatives.base, tmp_path / "full", tmp_path / "lora")
    base, full, lora = (load_file(folder / "model.safetensors") for folder in folders)
    integers = [key for key, tensor in base.items() if not tensor.is_floating_point()]
    assert len(integers) == 6
    assert all(int(load_file(relatives.full(0) / "model.safetensors")[key]) == 1 for key in integers)
    for key in integers:
        assert_same_bits(full[key], base[key], key)
    assert report.copied == sorted(key for key in base if "convolution" not in key)
    for key in report.copied:
        assert_same_bits(lora[key], base[key], key)
    assert not any(torch.equal(lora[key], base[key]) for key in report.merged)


def test_a_tensor_that_the_model_class_does_not_know_is_copied(relatives_of, tmp_path: Path) -> None:
    # Old GPT-2 checkpoints hold their attention masks.
    relatives = relatives_of("gpt2")
    base = tmp_path / "base"
    shutil.copytree(relatives.base, base)
    mask = torch.ones(1, 1, 16, 16, dtype=torch.uint8).tril()
    tensors = load_file(base / "model.safetensors") | {
        "h.0.attn.bias": mask,
        "h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    merge([relatives.full(0)], tmp_path / "merged", base_model=base, **CPU)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == tensors.keys()
    for key in ("h.0.attn.bias", "h.0.attn.masked_bias"):
        assert_same_bits(merged[key], tensors[key], key)


def test_excluded_parameters_are_copied_and_do_not_count(relatives_of, tmp_path: Path) -> None:
    relatives = relatives_of("mixtral")
    experts = [relatives.full(0), relatives.adapter(1), relatives.full(2)]
    config = NeuroMergingConfig(exclude=("*norm*", "lm_head.weight", "model.layers.0.self_attn.?_proj.weight"))
    report = merge(experts, tmp_path / "merged", base_model=relatives.base, config=config, **CPU)
    base = relatives.base_state()
    excluded = {key for key in base if re.search(r"norm|lm_head|layers\.0\.self_attn\._?._proj", key)}
    assert excluded == set(report.copied)
    states = [
        {key: tensor for key, tensor in state.items() if key not in excluded}
        for state in relatives.experts_state(experts)
    ]
    merged = relatives.base_state(tmp_path / "merged")
    neurons = relatives.family.neurons_of(base)
    assert_merged_as_reference(merged, report, base, states, neurons, exact_task_vectors=False)
