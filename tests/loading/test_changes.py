"""Tensors that a process cannot compare as they are: quantised ones, and those of which it holds a part."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from transformers import LlamaForCausalLM

from neuromerge_hf.loading.changes import compare
from tiny_models import load, save_llama

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def model(folder):
    return load(folder)


def changed(state, folder, model, **options):
    return compare(state, folder, LlamaForCausalLM, model.config, **options).changed


@pytest.mark.parametrize("kind", ["quantised", "subclass", "meta"])
def test_what_cannot_be_looked_at_is_taken_as_unchanged(folder, model, kind):
    state = model.state_dict()
    if kind == "quantised":
        state[NAME] = state[NAME].to(torch.float8_e4m3fn)
    elif kind == "subclass":
        state[NAME] = (state[NAME] + 1).as_subclass(type("Packed", (torch.Tensor,), {}))
    else:
        state[NAME] = state[NAME].to("meta")
    assert not changed(state, folder, model)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    assert changed(state, folder, model)


def test_a_parameter_that_the_model_lacks_is_a_change(folder, model):
    state = model.state_dict()
    del state[NAME]
    assert changed(state, folder, model)


def test_a_weight_that_a_quantiser_renamed_is_no_change(folder, model):
    state = model.state_dict()
    state[NAME.replace("weight", "W_q")] = state.pop(NAME).to(torch.uint8)
    assert not changed(state, folder, model, is_quantised=True)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    assert changed(state, folder, model, is_quantised=True)


def test_what_the_files_lack_is_added_unless_the_class_never_saves_it(folder, model, monkeypatch):
    state = model.state_dict() | {"value_head.weight": torch.ones(1, 32)}
    found = compare(state, folder, LlamaForCausalLM, model.config)
    assert (found.changed, found.added, found.is_equal) == (False, True, False)
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_save", ["value_head.weight"])
    assert compare(state, folder, LlamaForCausalLM, model.config).is_equal


def test_not_a_number_is_no_change_where_it_was_stored(folder, model, tmp_path):
    model.lm_head.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    assert not changed(model.state_dict(), tmp_path, model)
    assert changed(load(folder).state_dict(), tmp_path, model)


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_part_of_a_sharded_tensor_is_compared(folder, model, mesh, dtype):
    state = {name: distribute_tensor(tensor.to(dtype), mesh, [Shard(0)]) for name, tensor in model.state_dict().items()}
    assert not changed(state, folder, model)
    state[NAME].to_local()[-1, -1] += 1
    assert changed(state, folder, model)
