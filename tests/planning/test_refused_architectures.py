"""Models that are no fine-tunes of the base are refused with both sides of the difference."""

import peft
import pytest
import torch

from changes import DOWN, EMBEDDINGS, change_json, change_tensors, says
from neuromerge_hf import MergeError, plan_merge
from tiny_models import load, save_adapter, save_llama, seeded


def test_another_model_type_is_refused(models, refused):
    message = refused([models / "bert"], base_model=models / "base")
    assert says(message, models / "bert", "bert model", models / "base", "llama model")


def test_another_number_of_layers_is_refused(models, tmp_path, refused):
    deeper = save_llama(tmp_path / "deeper", num_hidden_layers=3)
    message = refused([deeper], base_model=models / "base")
    assert says(message, "architectures differ", deeper, models / "base", "model.layers.2.", "base_model")
    message = refused([models / "math"], base_model=deeper)
    assert says(message, "architectures differ", models / "math", deeper, "model.layers.2.")


def test_another_hidden_size_is_refused(models, tmp_path, refused):
    wider = save_llama(tmp_path / "wider", hidden_size=64)
    message = refused([wider], base_model=models / "base")
    assert says(message, "architectures differ", wider, models / "base", "64", "32", "base_model")


def test_shapes_that_contradict_the_configuration_are_refused_with_both_files(models, copied, refused):
    def widen(tensors):
        tensors[DOWN] = torch.zeros(32, 50)

    expert = copied("math")
    change_tensors(expert / "model.safetensors", widen)
    message = refused([expert], base_model=models / "base")
    assert says(message, DOWN, "(32, 50)", "(32, 48)", expert / "model.safetensors")
    assert says(message, models / "base" / "model.safetensors", "base_model")


def test_another_vocabulary_size_is_refused(models, tmp_path, refused):
    with seeded(0):
        model = load(models / "base")
        model.resize_token_embeddings(44, mean_resizing=False)
    model.save_pretrained(tmp_path / "resized")
    message = refused([tmp_path / "resized"], base_model=models / "base")
    assert says(message, "vocabularies differ", EMBEDDINGS, "(44, 32)", "(40, 32)", "resize_token_embeddings")
    assert says(message, tmp_path / "resized", models / "base")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_with_another_vocabulary_size_is_refused(models, tmp_path, refused):
    with seeded(0):
        model = load(models / "base")
        model.resize_token_embeddings(44, mean_resizing=False)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "resized", save_embedding_layers=True)
    message = refused([tmp_path / "resized"], base_model=models / "base")
    assert says(message, "vocabularies differ", EMBEDDINGS, "(44, 32)", "(40, 32)", "resize_token_embeddings")
    assert says(message, tmp_path / "resized" / "adapter_model.safetensors", models / "base")


def test_an_adapter_of_another_size_is_refused(models, tmp_path, refused):
    wider = save_llama(tmp_path / "wider", hidden_size=64)
    adapter = save_adapter(wider, tmp_path / "adapter", seed=1, target_modules=["q_proj"])
    message = refused([adapter], base_model=models / "base")
    assert says(message, "q_proj", "(4, 64)", "(32, 32)", adapter / "adapter_model.safetensors", "base_model")


def test_an_adapter_of_other_modules_is_refused(models, tmp_path, refused):
    adapter = save_adapter(models / "bert", tmp_path / "adapter", seed=1, target_modules=["query"])
    message = refused([adapter], base_model=models / "base")
    assert says(message, adapter, "query", "does not have", models / "base", "base_model")


def test_without_a_base_it_says_how_to_name_one(models, refused):
    message = refused([models / "math", models / "sharded"])
    assert says(message, "No base model", "base_model=", "--base-model")


def test_adapters_of_different_bases_are_refused(models, tmp_path, refused):
    other = save_llama(tmp_path / "other", seed=9)
    adapter = save_adapter(other, tmp_path / "adapter", seed=1)
    message = refused([models / "code", adapter])
    assert says(message, "different bases", models / "code", models / "base", adapter, other, "base_model=")


def test_an_adapter_whose_base_is_gone_says_which_base_it_names(models, copied, refused):
    adapter = copied("code")
    change_json(adapter / "adapter_config.json", base_model_name_or_path="/gone/base")
    assert says(refused([adapter]), adapter, "/gone/base", "base_model=")


def test_a_base_that_is_an_adapter_is_refused(models, refused):
    message = refused([models / "math"], base_model=models / "code")
    assert says(message, models / "code", "adapter")


def test_several_problems_are_reported_together(models, copied, tmp_path, refused):
    expert, adapter = copied("math"), copied("code")
    (expert / "model.safetensors").write_bytes(b"")
    (adapter / "adapter_model.safetensors").unlink()
    message = refused([models / "sharded", expert, adapter], base_model=models / "base")
    assert says(message, "2 problems were found:\n  * ", expert / "model.safetensors", adapter)

    wider = save_llama(tmp_path / "wider", hidden_size=64)
    message = refused([models / "bert", wider], base_model=models / "base")
    assert says(message, "2 problems", models / "bert", wider)

    message = refused(["./gone", "nobody/nothing", models / "math"], base_model=models / "base")
    assert says(message, "2 problems", "./gone", "nobody/nothing")


def test_the_error_lists_its_problems(models):
    with pytest.raises(MergeError) as caught:
        plan_merge(["./gone", "./away"], base_model=models / "base")
    assert len(caught.value.problems) == 2
    assert isinstance(caught.value, ValueError)
