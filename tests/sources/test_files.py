"""The files that hold weights change nothing: shards, .bin files, links, dtypes, tied weights stored twice."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from families import CPU, GIVES_BACK, Relatives, assert_merged_as_reference, assert_same_bits, load_cleanly, state
from merged_models import read_tensors
from neuromerge_hf import NeuroMergingConfig, merge, plan_merge
from tiny_models import contents, load_adapted


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


def test_bin_files_of_parameters_give_the_same_merge(relatives_of, tmp_path: Path) -> None:
    relatives = relatives_of("llama")
    want = merge_of([relatives.full(0)], relatives.base, tmp_path / "want")
    folders = [save_as_bin(folder, tmp_path / folder.name, 1, {}) for folder in (relatives.base, relatives.full(0))]
    for folder in folders:
        state = torch.load(folder / "pytorch_model.bin")
        torch.save({name: torch.nn.Parameter(x) for name, x in state.items()}, folder / "pytorch_model.bin")
    assert merge_of([folders[1]], folders[0], tmp_path / "got") == want


def merge_of(experts: list[Path], base: Path, output: Path) -> bytes:
    """The weight file of a merge."""
    merge(experts, output, base_model=base, **CPU)
    return contents(output)["model.safetensors"]


def shards_of(relatives: Relatives, folder: Path) -> tuple[Path, dict[str, str]]:
    """A copy of a fine-tune in several shards, and the shard of each tensor."""
    relatives.family.base_class.from_pretrained(relatives.full(0)).save_pretrained(folder, max_shard_size="3KB")
    return folder, json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def test_of_a_tensor_in_two_shards_the_one_that_the_index_names_is_merged(relatives_of, tmp_path: Path) -> None:
    relatives = relatives_of("llama")
    want = merge_of([relatives.full(0)], relatives.base, tmp_path / "want")
    expert, weight_map = shards_of(relatives, tmp_path / "expert")
    for place in (0, -1):  # before and after the right one
        name, shard = sorted(weight_map.items(), key=lambda item: item[1])[len(weight_map) // 2]
        other = expert / sorted(set(weight_map.values()))[place]
        tensors = load_file(other)
        save_file({**tensors, name: torch.ones_like(load_file(expert / shard)[name])}, other)
        plan = plan_merge([expert], base_model=relatives.base, **CPU)
        assert [note for note in plan.notes if name in note and shard in note and "index.json says" in note]
        assert f"Note: expert: {name} is in several weight files" in str(plan)
        assert merge_of([expert], relatives.base, tmp_path / f"got{place}") == want
        report = json.loads((tmp_path / f"got{place}" / "merge_report.json").read_text())
        assert report["notes"] == plan.notes
        save_file(tensors, other)


def test_the_note_on_a_tensor_in_two_shards_is_of_the_base_too(relatives_of, tmp_path: Path) -> None:
    relatives = relatives_of("llama")
    base, weight_map = shards_of(relatives, tmp_path / "base")
    (name, shard), *_ = sorted(weight_map.items(), key=lambda item: item[1])
    other = base / sorted(set(weight_map.values()))[-1]
    save_file({**load_file(other), name: load_file(base / shard)[name]}, other)
    (note,) = plan_merge([relatives.full(0)], base_model=base, **CPU).notes
    assert note.startswith(f"base: {name} is in several weight files")


def test_shards_are_opened_as_transformers_opens_them(relatives_of, tmp_path: Path) -> None:
    relatives = relatives_of("llama")
    want = merge_of([relatives.full(0)], relatives.base, tmp_path / "want")
    expert, weight_map = shards_of(relatives, tmp_path / "expert")
    shards = list(weight_map.values())
    name, shard = next(item for item in weight_map.items() if shards.count(item[1]) > 1)
    save_file({name: torch.ones_like(load_file(expert / shard)[name])}, expert / "model-99999-of-99999.safetensors")
    left = {key: value for key, value in weight_map.items() if key != name}  # its shard is listed
    index = {"metadata": {}, "weight_map": left}
    (expert / "model.safetensors.index.json").write_text(json.dumps(index))
    model = relatives.family.base_class.from_pretrained(expert)
    assert torch.equal(model.state_dict()[name], load_file(relatives.full(0) / "model.safetensors")[name])
    assert merge_of([expert], relatives.base, tmp_path / "got") == want


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
    options = {"base_model": stored.base, "config": NeuroMergingConfig(), **CPU}
    merge(experts, tmp_path / "auto", **options)
    merge(experts, tmp_path / "half", dtype="float16", **options)
    report = merge(experts, tmp_path / "exact", dtype=torch.float32, **options)
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


def test_a_link_to_the_weights_is_followed(relatives_of, tmp_path: Path) -> None:
    # Large weights often lie on another disk.
    relatives = relatives_of("llama")
    shutil.copytree(relatives.full(0), tmp_path / "linked")
    for path in (tmp_path / "linked").glob("*.safetensors"):
        path.unlink()
        os.symlink(relatives.full(0) / path.name, path)
    merge([relatives.full(0)], tmp_path / "want", base_model=relatives.base, **CPU)
    merge([tmp_path / "linked"], tmp_path / "got", base_model=relatives.base, **CPU)
    assert contents(tmp_path / "got")["model.safetensors"] == contents(tmp_path / "want")["model.safetensors"]
