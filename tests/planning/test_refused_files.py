"""Files that are missing, damaged or not to be trusted are refused by name, and nothing in them is run."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from changes import DOWN, change_json, change_tensors, says
from neuromerge_hf import merge
from tiny_models import load


@pytest.fixture
def pickled(copied):
    """A fine-tune in a .bin file."""

    def make(state: object, name: str = "pickled") -> Path:
        folder = copied("math", name)
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
        return folder

    return make


def test_a_broken_adapter_configuration_is_refused(models, copied, refused):
    adapter = copied("code")
    (adapter / "adapter_config.json").write_text("{")
    assert says(refused([adapter], base_model=models / "base"), adapter / "adapter_config.json")


def test_a_missing_weight_file_is_refused(models, copied, refused):
    expert, adapter, base = copied("math"), copied("code"), copied("base")
    (expert / "model.safetensors").unlink()
    message = refused([expert], base_model=models / "base")
    assert says(message, expert, "no weights", "model.safetensors", "pytorch_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert says(refused([adapter], base_model=models / "base"), adapter, "no weights", "adapter_model.safetensors")
    (base / "model.safetensors").unlink()
    assert says(refused([models / "math"], base_model=base), base, "no weights", "model.safetensors")


@pytest.mark.parametrize("name", ["math/model.safetensors", "code/adapter_model.safetensors"])
@pytest.mark.parametrize("size", [4, 100, -5], ids=["length", "header", "body"])
def test_a_truncated_safetensors_file_is_refused(models, copied, refused, name, size):
    file = copied(name.partition("/")[0]) / Path(name).name
    os.truncate(file, size if size > 0 else file.stat().st_size + size)
    message = refused([file.parent], base_model=models / "base")
    assert says(message, file, "truncated", f"{file.stat().st_size} bytes", "again")


def test_a_file_that_only_claims_to_be_safetensors_is_refused(models, copied, refused):
    expert = copied("math")
    for content in (b"", b"<!DOCTYPE html>" * 9, (2).to_bytes(8, "little") + b"[]"):
        (expert / "model.safetensors").write_bytes(content)
        assert says(refused([expert], base_model=models / "base"), expert / "model.safetensors", "again")


def test_a_truncated_bin_file_is_refused(models, pickled, refused):
    expert = pickled(load(models / "math").state_dict())
    merge([expert], expert.parent / "fine", base_model=models / "base")
    file = expert / "pytorch_model.bin"
    os.truncate(file, file.stat().st_size - 100)
    assert says(refused([expert], base_model=models / "base"), file, "again")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_a_pickle_that_holds_code_is_refused_and_not_run(models, pickled, refused, tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    expert = pickled(load(models / "math").state_dict() | {"extra": Malicious()})
    message = refused([expert], base_model=models / "base")
    assert says(message, expert / "pytorch_model.bin", "weights_only", "safetensors")
    (expert / "pytorch_model.bin").write_bytes(pickle.dumps({"extra": Malicious()}))
    assert says(refused([expert], base_model=models / "base"), expert / "pytorch_model.bin", "weights_only")
    assert not (tmp_path / "executed").exists()


def test_a_bin_file_that_is_no_state_dict_is_refused(models, pickled, refused):
    expert = pickled([torch.zeros(3)])
    assert says(refused([expert], base_model=models / "base"), expert / "pytorch_model.bin", "state dict")


def test_a_missing_shard_is_refused(models, copied, refused):
    expert = copied("sharded")
    shard = sorted(expert.glob("model-*.safetensors"))[1]
    shard.unlink()
    message = refused([expert], base_model=models / "base")
    assert says(message, shard, "missing", "model.safetensors.index.json", "again")


@pytest.mark.parametrize("outside", ["../math/model.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_an_index_that_names_a_file_outside_its_folder_is_refused(models, copied, refused, outside):
    copied("math")
    expert = copied("sharded")
    index = expert / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    change_json(index, weight_map=weight_map | {DOWN: outside})
    assert says(refused([expert], base_model=models / "base"), index, repr(outside), "outside its folder")


def test_a_tensor_that_an_index_lists_and_no_file_holds_is_refused(models, copied, refused):
    expert = copied("sharded")
    index = json.loads((expert / "model.safetensors.index.json").read_text())
    change_tensors(expert / index["weight_map"][DOWN], lambda tensors: tensors.pop(DOWN))
    message = refused([expert], base_model=models / "base")
    assert says(message, expert / "model.safetensors.index.json", DOWN, "again")


def test_a_tensor_that_is_in_another_shard_than_the_index_says_is_refused(models, copied, refused):
    expert = copied("sharded")
    index = expert / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    other = next(shard for shard in sorted(weight_map.values()) if shard != weight_map[DOWN])
    change_json(index, weight_map=weight_map | {DOWN: other})
    assert says(refused([expert], base_model=models / "base"), index, DOWN, other, "again")


def test_a_broken_index_is_refused(models, copied, refused):
    expert = copied("sharded")
    for content in ("{", "[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": []}', "[" * 100_000):
        (expert / "model.safetensors.index.json").write_text(content)
        assert says(refused([expert], base_model=models / "base"), expert / "model.safetensors.index.json", "index")


def test_a_missing_parameter_is_refused(models, copied, refused):
    expert, base = copied("math"), copied("base")
    change_tensors(expert / "model.safetensors", lambda tensors: tensors.pop(DOWN))
    message = refused([expert], base_model=models / "base")
    assert says(message, expert, DOWN, "LlamaForCausalLM", expert / "model.safetensors")
    change_tensors(base / "model.safetensors", lambda tensors: tensors.pop(DOWN))
    message = refused([models / "math"], base_model=base)
    assert says(message, base, DOWN, "LlamaForCausalLM", base / "model.safetensors")


def test_half_an_adapter_is_refused(models, copied, refused):
    adapter = copied("code")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    change_tensors(adapter / "adapter_model.safetensors", lambda tensors: tensors.pop(key))
    message = refused([adapter], base_model=models / "base")
    assert says(message, adapter / "adapter_model.safetensors", "lora_A", "model.layers.0.self_attn.q_proj")


def test_a_missing_or_broken_configuration_is_refused(models, copied, refused):
    expert = copied("math")
    (expert / "config.json").write_text("{")
    assert says(refused([expert], base_model=models / "base"), expert / "config.json", "cannot be read")
    (expert / "config.json").unlink()
    assert says(refused([expert], base_model=models / "base"), expert, "config.json", "adapter_config.json")
