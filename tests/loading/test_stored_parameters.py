"""Parameters that are read from their files one at a time are those of the model that transformers loads."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import Relatives
from neuromerge_hf import MergeError
from neuromerge_hf.loading.stored_parameters import StoredParameters
from neuromerge_hf.skeleton import skeleton_of
from neuromerge_hf.storage.files import CHECKPOINT_FILES, find_weights
from neuromerge_hf.storage.formats import open_weights
from stored_forms import FAMILIES
from tiny_models import load, save_bert, save_llama


def parameters_of(folder, model):
    return StoredParameters(
        skeleton_of(type(model), model.config), open_weights(find_weights(folder, CHECKPOINT_FILES))
    )


def assert_equal(stored, model):
    expected = model.state_dict()
    assert set(stored) == set(expected)
    assert len(stored) == len(expected)
    for name in stored:
        assert torch.equal(stored[name], expected[name]), name


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "t5", "mixtral", "vit", "qwen3-vl-moe"])
def test_they_have_transformers_names_shapes_and_values(name, tmp_path):
    relatives = Relatives(name, tmp_path, FAMILIES)
    assert_equal(parameters_of(relatives.base, model := load(relatives.base)), model)


def test_shards_are_read_as_one_model(tmp_path):
    folder = save_llama(tmp_path / "model", dtype="bfloat16", shard="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_equal(parameters_of(folder, model := load(folder)), model)


def test_what_the_files_lack_is_not_among_them(tmp_path):
    folder = save_bert(tmp_path / "model")
    classifier = load(folder, "BertForSequenceClassification")
    stored = parameters_of(folder, classifier)
    assert set(classifier.state_dict()) - set(stored) == {"classifier.weight", "classifier.bias"}
    assert "classifier.weight" not in stored


def test_copies_of_a_tied_parameter_that_differ_are_refused(tmp_path):
    folder = save_llama(tmp_path / "model", tie_word_embeddings=True)
    model, file = load(folder), folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(MergeError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ"):
        parameters_of(folder, model)
