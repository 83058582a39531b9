"""`merge` from end to end on a tiny model of each family, against the reference and against the experts themselves.

Merged models are loaded by plain transformers. What the reference merges is what transformers and PEFT load, so names
in files, tied weights and converted weights are checked on the way.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from families import FAMILIES, GIVES_BACK, Relatives, assert_merged_as_reference, assert_same_bits, state
from neuromerge_hf import AutoMergedModel, MergeError, NeuroMergingConfig, merge
from neuromerge_hf.sources.heads import task_class
from tiny_models import contents, load, load_adapted

KINDS = ("full", "lora")
CPU = {"device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def relatives_of(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Relatives] = {}

    def relatives_of(name: str) -> Relatives:
        return made.setdefault(name, Relatives(name, tmp_path_factory.mktemp(name)))

    return relatives_of


def load_merged(relatives: Relatives, merged: Path, expert: Path, number: int) -> torch.nn.Module:
    """The merged model as an expert's class, with the expert's own head where the base has none."""
    model = relatives.untrained(number, merged)
    head = merged / "heads" / expert.name / "head.safetensors"
    if head.exists():
        assert not model.load_state_dict(load_file(head), strict=False).unexpected_keys
    return model.eval()


def load_cleanly(model_class: type[transformers.PreTrainedModel], folder: Path) -> transformers.PreTrainedModel:
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's safetensors files, by their stored names."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


# Variants of LoRA. That one untrimmed expert is given back: test_families.py


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


# Three experts, against the reference


@pytest.mark.parametrize("kinds", [("full",) * 3, ("lora",) * 3, ("full", "lora", "full")], ids="-".join)
@pytest.mark.parametrize("name", FAMILIES)
def test_three_experts_are_merged_as_the_reference_does(name: str, kinds, relatives_of, tmp_path: Path) -> None:
    relatives = relatives_of(name)
    experts = [relatives.expert(kind, number) for number, kind in enumerate(kinds)]
    report = merge(experts, tmp_path / "merged", base_model=relatives.base, **CPU)
    base = relatives.base_state()
    assert_merged_as_reference(
        relatives.base_state(tmp_path / "merged"),
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


# The directory


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_merged_directory_is_a_plain_model_and_a_recipe(name: str, kind: str, relatives_of, tmp_path: Path) -> None:
    relatives = relatives_of(name)
    experts = [relatives.expert(kind, number) for number in range(2)]
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
        [expert], base_model=bare["llama-tied"], head=expert.name, cache_dir=tmp_path / "cache", device="cpu"
    )
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert_same_bits(model.lm_head.weight, load(expert).lm_head.weight)


def test_an_adapter_of_a_model_with_images_is_not_taken_for_its_text_model() -> None:
    assert task_class("CAUSAL_LM", transformers.LlamaConfig()) is transformers.LlamaForCausalLM
    assert task_class("CAUSAL_LM", transformers.Llama4Config()) is None


# Ways to store the same weights


def shard_sizes(folder: Path) -> list[int]:
    return [path.stat().st_size for path in folder.glob("model-*-of-*.safetensors")]


def save_as_bin(folder: Path, target: Path, shards: int, tied: dict[str, str]) -> Path:
    """A copy of a model as torch.save makes it, tied parameters under all their names; sharded if `shards` > 1."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: tensors[owner] for name, owner in tied.items()}
    names = list(tensors)
    if shards == 1:
        torch.save(tensors, target / "pytorch_model.bin")
        return target
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        torch.save({name: tensors[name] for name in names[i::shards]}, target / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_shards_in_and_out_hold_the_same_weights(name: str, relatives_of, tmp_path: Path) -> None:
    relatives = relatives_of(name)
    sharded = []
    for folder in (relatives.base, relatives.full(0), relatives.full(1)):
        sharded.append(tmp_path / folder.name)
        relatives.family.base_class.from_pretrained(folder).save_pretrained(sharded[-1], max_shard_size="3KB")
        assert len(shard_sizes(sharded[-1])) > 3
    whole, split = tmp_path / "whole", tmp_path / "split"
    merge([relatives.full(0), relatives.full(1)], whole, base_model=relatives.base, **CPU)
    merge(sharded[1:], split, base_model=sharded[0], max_shard_size="4KB", **CPU)
    assert len(shard_sizes(split)) > 3
    assert all(path.suffix != ".bin" for path in split.iterdir())
    index = json.loads((split / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in split.glob("*.safetensors")}
    want = load_file(whole / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in want.values())
    got = read_tensors(split)
    assert got.keys() == want.keys() == index["weight_map"].keys()
    for key in want:
        assert_same_bits(got[key], want[key], key)
    load_cleanly(relatives.family.base_class, split)


@pytest.mark.parametrize("shards", [1, 3])
def test_bin_files_and_tied_weights_stored_twice_give_the_same_merge(shards: int, relatives_of, tmp_path: Path) -> None:
    copies = ["lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    for name, tied in (
        ("llama-tied", {"lm_head.weight": "model.embed_tokens.weight"}),
        ("t5", dict.fromkeys(copies, "shared.weight")),
    ):
        relatives = relatives_of(name)
        folders = [relatives.base, relatives.full(0), relatives.full(1)]
        pickled = [save_as_bin(folder, tmp_path / name / folder.name, shards, tied) for folder in folders]
        merge(folders[1:], tmp_path / name / "want", base_model=folders[0], **CPU)
        merge(pickled[1:], tmp_path / name / "got", base_model=pickled[0], **CPU)
        load_cleanly(relatives.family.base_class, tmp_path / name / "got")
        want, got = (state(relatives.family.base_class.from_pretrained(tmp_path / name / x)) for x in ("want", "got"))
        assert got.keys() == want.keys()
        for key in want:
            assert_same_bits(got[key], want[key], key)


def test_an_adapter_in_a_bin_file_is_the_same_adapter(relatives_of, tmp_path: Path) -> None:
    relatives = relatives_of("llama")
    copy = tmp_path / "adapter"
    shutil.copytree(relatives.adapter(0), copy)
    torch.save(load_file(copy / "adapter_model.safetensors"), copy / "adapter_model.bin")
    (copy / "adapter_model.safetensors").unlink()
    merge([relatives.adapter(0)], tmp_path / "want", base_model=relatives.base, **CPU)
    merge([copy], tmp_path / "got", base_model=relatives.base, **CPU)
    assert contents(tmp_path / "got")["model.safetensors"] == contents(tmp_path / "want")["model.safetensors"]


def to_bfloat16(folder: Path, target: Path) -> Path:
    """A copy of a model or adapter with bfloat16 weights."""
    shutil.copytree(folder, target)
    (file,) = target.glob("*.safetensors")
    tensors = load_file(file)
    rounded = {key: tensor.bfloat16() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    save_file(rounded, file, metadata={"format": "pt"})
    config = target / "config.json"
    if config.exists():
        config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))
    return target


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "resnet"])
def test_bfloat16_models_are_merged_in_float32_and_rounded_once(name: str, relatives_of, tmp_path: Path) -> None:
    relatives = relatives_of(name)
    for folder in (relatives.base, relatives.full(0), relatives.adapter(1), relatives.full(2)):
        to_bfloat16(folder, tmp_path / folder.name)
    stored = Relatives(name, tmp_path)
    experts = [stored.full(0), stored.adapter(1), stored.full(2)]
    merge(experts, tmp_path / "auto", base_model=stored.base, **CPU)
    merge(experts, tmp_path / "half", base_model=stored.base, dtype="float16", **CPU)
    report = merge(experts, tmp_path / "exact", base_model=stored.base, dtype=torch.float32, **CPU)
    exact = read_tensors(tmp_path / "exact")
    for folder, dtype in (("auto", torch.bfloat16), ("half", torch.float16), ("exact", torch.float32)):
        assert transformers.AutoConfig.from_pretrained(tmp_path / folder).dtype == dtype
        for key, tensor in read_tensors(tmp_path / folder).items():
            assert_same_bits(tensor, exact[key].to(dtype) if tensor.is_floating_point() else exact[key], key)
    base = stored.base_state()
    states = stored.experts_state(experts)
    merged = stored.base_state(tmp_path / "exact")
    assert_merged_as_reference(merged, report, base, states, stored.family.neurons_of(base), exact_task_vectors=False)


def test_base_and_experts_may_have_different_dtypes(relatives_of, tmp_path: Path) -> None:
    relatives = relatives_of("llama")
    expert = to_bfloat16(relatives.full(0), tmp_path / "expert")
    merge([expert], tmp_path / "merged", base_model=relatives.base, config=GIVES_BACK, **CPU)
    merged, want = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", expert))
    for key, tensor in merged.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, want[key].float(), rtol=1e-6, atol=1e-6)


def test_two_matrices_are_not_merged_with_one(relatives_of, tmp_path: Path) -> None:
    base, expert = relatives_of("llama").base, relatives_of("llama-tied").full(0)
    with pytest.raises(MergeError, match=re.escape(f"{expert} ties lm_head.weight to model.embed_tokens.weight")):
        merge([expert], tmp_path / "merged", base_model=base, **CPU)


# What is not merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_embeddings_that_an_adapter_stores_unchanged_are_left_alone(dtype, relatives_of, tmp_path: Path) -> None:
    relatives = relatives_of("llama-tied")
    adapter = load_adapted(relatives.base, relatives.adapter(0), dtype=dtype)
    for name, embeddings in (("plain", False), ("embeddings", True)):
        adapter.save_pretrained(tmp_path / name, save_embedding_layers=embeddings)
        merge([tmp_path / name], tmp_path / f"merged-{name}", base_model=relatives.base, **CPU)
    file = tmp_path / "embeddings" / "adapter_model.safetensors"
    assert "base_model.model.model.embed_tokens.weight" in load_file(file)
    merged = [contents(tmp_path / f"merged-{name}")["model.safetensors"] for name in ("plain", "embeddings")]
    assert merged[0] == merged[1]


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


def test_backbones_merge_into_a_base_with_a_head(relatives_of, tmp_path: Path) -> None:
    relatives = relatives_of("bert")
    config = transformers.BertConfig.from_pretrained(relatives.base)
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config)
    missing = model.bert.load_state_dict(relatives.base_state(), strict=False)
    assert all(key.startswith("pooler.") for key in missing.unexpected_keys)
    model.save_pretrained(tmp_path / "base")
    merge([relatives.full(0), relatives.full(1)], tmp_path / "merged", base_model=tmp_path / "base", **CPU)
    config = NeuroMergingConfig(exclude=("pooler.*",))
    merge([relatives.full(0), relatives.full(1)], tmp_path / "want", base_model=relatives.base, config=config, **CPU)
    merged = state(load_cleanly(transformers.BertForMaskedLM, tmp_path / "merged"))
    want = relatives.base_state(tmp_path / "want")
    for key, tensor in merged.items():
        own = key.startswith("cls.")
        assert_same_bits(tensor, state(model)[key] if own else want[key.removeprefix("bert.")], key)


# Files


def test_a_link_to_the_weights_is_followed(relatives_of, tmp_path: Path) -> None:
    # The Hub's cache holds links.
    relatives = relatives_of("llama")
    for path in relatives.full(0).iterdir():
        (tmp_path / "linked").mkdir(exist_ok=True)
        os.symlink(path, tmp_path / "linked" / path.name)
    merge([relatives.full(0)], tmp_path / "want", base_model=relatives.base, **CPU)
    merge([tmp_path / "linked"], tmp_path / "got", base_model=relatives.base, **CPU)
    assert contents(tmp_path / "got")["model.safetensors"] == contents(tmp_path / "want")["model.safetensors"]
