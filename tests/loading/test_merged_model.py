"""What `AutoMergedModel` returns is its architecture's own model: copied, pickled and compiled like any other."""

import copy
import io
import pickle

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from neuromerge_hf import AutoMergedModel
from neuromerge_hf.folder.report import load_report
from tiny_models import (
    contents,
    disturb,
    load,
    logits,
    merged_folder,
)


def test_it_is_an_instance_of_the_architectures_own_class(model):
    plain = transformers.LlamaForCausalLM
    assert isinstance(model, plain)
    names = ("__name__", "__qualname__", "__module__", "__doc__")
    assert [getattr(type(model), name) for name in names] == [getattr(plain, name) for name in names]
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert not model.is_custom_code()


def test_two_models_of_an_architecture_are_of_one_class(load_merged):
    assert type(load_merged()) is type(load_merged(dtype="bfloat16"))


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_is_the_same_kind_of_object(hub, model, through):
    copied = through(model)
    assert type(copied) is type(model)
    assert torch.equal(logits(copied), logits(model))
    name = f"object/{through.__name__.replace('_', '-')}"
    copied.push_to_hub(name)
    pushed, made = hub.files(name), contents(merged_folder(model))
    assert pushed["model.safetensors"] == made["model.safetensors"]


def test_a_pickle_holds_no_token(models, cache):
    model = AutoMergedModel.from_pretrained([models / "code"], merge_cache_dir=cache, token="hf_secret")
    assert b"hf_secret" not in pickle.dumps(model)


def test_a_pickle_of_a_model_from_the_hub_holds_no_token(hub, model, cache):
    hub.add_folder("object/secret", merged_folder(model))
    loaded = AutoMergedModel.from_pretrained("object/secret", merge_cache_dir=cache, token="hf_secret")
    assert b"object/secret" in pickle.dumps(loaded)
    assert b"hf_secret" not in pickle.dumps(loaded)


def test_peft_wraps_it_and_merges_into_it(model, tmp_path):
    before = logits(model)
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules="all-linear"))
    assert torch.equal(logits(wrapped), before)
    disturb(wrapped, trainable_only=True)
    after = logits(wrapped.eval())
    wrapped.save_pretrained(tmp_path / "adapter")
    assert {path.suffix for path in (tmp_path / "adapter").glob("*.safetensors")} == {".safetensors"}
    unwrapped = wrapped.merge_and_unload()
    assert torch.allclose(logits(unwrapped), after, atol=1e-5)
    unwrapped.save_pretrained(tmp_path / "unwrapped")
    assert load_report(tmp_path / "unwrapped").changed
    assert torch.equal(logits(load(tmp_path / "unwrapped")), logits(unwrapped))


def test_it_is_compiled_and_generates(model):
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(logits(compiled), logits(model), atol=1e-5)
    prompt = torch.arange(4, 8).view(1, 4)
    assert model.generate(prompt, max_new_tokens=3, do_sample=False).shape[1] > 4
    assert compiled._orig_mod is model


def test_layers_on_the_disk_are_saved_and_unchanged(load_merged, tmp_path):
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load_merged(device_map=device_map, offload_folder=tmp_path / "offload")
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(load_merged()))
    assert not load_report(tmp_path / "saved").changed
