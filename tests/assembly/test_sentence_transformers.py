"""The merge of SentenceTransformers is one: it gives the embeddings of the merged weights through the same modules."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

from cards import card_of, code_blocks
from neuromerge_hf import AutoMergedModel, MergeError, merge, merge_recipe, plan_merge
from neuromerge_hf.hub.push import push
from tiny_models import save_bert, save_fine_tune, save_tokenizer, seeded

TEXTS = ["the quick brown fox", "jumps over", "the lazy dog"]


def save_sentence_transformer(encoder, folder, *, pooling="cls", dense_seed=None):
    """A SentenceTransformer around a saved encoder, with a Dense layer if it gets a seed."""
    transformer = Transformer(str(encoder))
    modules = [transformer, Pooling(24, pooling_mode=pooling)]
    if dense_seed is not None:
        with seeded(dense_seed):
            modules.append(Dense(24, 8))
    SentenceTransformer(modules=[*modules, Normalize()], device="cpu").save(str(folder))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An encoder, and a SentenceTransformer and two fine-tunes of it."""
    folder = tmp_path_factory.mktemp("models")
    encoder = save_bert(folder / "encoder")
    base = save_sentence_transformer(encoder, folder / "base", dense_seed=0)
    experts = []
    for seed in (1, 2):
        tuned = save_fine_tune(encoder, folder / f"tuned-{seed}", seed=seed)
        save_tokenizer(tuned)
        experts.append(save_sentence_transformer(tuned, folder / f"expert-{seed}", dense_seed=0))
    return encoder, base, experts


def embeddings(folder):
    return SentenceTransformer(str(folder), device="cpu").encode(TEXTS)


def with_weights(source, weights, folder):
    """A copy of a SentenceTransformer whose transformer has other weights."""
    shutil.copytree(source, folder)
    shutil.copyfile(weights / "model.safetensors", folder / "model.safetensors")
    return folder


def test_the_merge_gives_the_embeddings_of_the_merged_weights(models, tmp_path):
    _, base, experts = models
    report = merge(experts, tmp_path / "merged", base_model=base)
    expected = embeddings(with_weights(base, tmp_path / "merged", tmp_path / "by-hand"))
    assert np.array_equal(embeddings(tmp_path / "merged"), expected)
    assert not np.allclose(expected, embeddings(base), atol=1e-3)
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"} <= set(report.files)
    assert not [note for note in report.notes if "modules" in note]
    merge(experts, tmp_path / "merged", base_model=base, overwrite=True)

    metadata, text = card_of(tmp_path / "merged")
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("sentence-transformers", "sentence-similarity")
    assert "sentence-transformers" in metadata["tags"]
    (code, *_) = code_blocks(text, "python")
    assert 'SentenceTransformer("./merged")' in code


def test_the_quick_start_runs_as_pasted(models, tmp_path, monkeypatch, capsys):
    _, base, experts = models
    merge(experts, tmp_path / "merged", base_model=base)
    monkeypatch.chdir(tmp_path)
    (code, *_) = code_blocks(card_of(tmp_path / "merged")[1], "python")
    exec(code, {})
    assert "tensor([[1.0000" in capsys.readouterr().out


def test_the_recipe_makes_it_again(models, tmp_path):
    _, base, experts = models
    merge(experts, tmp_path / "merged", base_model=base)
    merge_recipe(tmp_path / "merged" / "recipe.yaml", tmp_path / "again")
    assert np.array_equal(embeddings(tmp_path / "again"), embeddings(tmp_path / "merged"))
    copy = shutil.copytree(base, tmp_path / "base")
    merge(experts, tmp_path / "other", base_model=copy)
    pooling = copy / "1_Pooling" / "config.json"
    pooling.write_text(pooling.read_text().replace("cls", "max"))
    with pytest.raises(MergeError, match=r"1_Pooling/config\.json has changed since the recipe"):
        merge_recipe(tmp_path / "other" / "recipe.yaml", tmp_path / "changed")


def test_experts_that_became_sentence_transformers_give_their_modules(models, tmp_path):
    encoder, _, experts = models
    merge(experts, tmp_path / "merged", base_model=encoder)
    expected = embeddings(with_weights(experts[0], tmp_path / "merged", tmp_path / "by-hand"))
    assert np.array_equal(embeddings(tmp_path / "merged"), expected)


@pytest.mark.parametrize("change", [{"pooling": "mean", "dense_seed": 0}, {"dense_seed": 5}])
def test_modules_that_differ_are_said(models, tmp_path, change):
    encoder, base, experts = models
    other = save_sentence_transformer(encoder.parent / "tuned-1", tmp_path / "other", **change)
    report = merge([experts[1], other], tmp_path / "merged", base_model=base)
    (note,) = [note for note in report.notes if "sentence-transformers modules" in note]
    assert note.startswith("other has other sentence-transformers modules than base")
    assert "other has other sentence-transformers modules" in card_of(tmp_path / "merged")[1]
    kept = load_file(tmp_path / "merged" / "2_Dense" / "model.safetensors")["linear.weight"]
    assert torch.equal(kept, load_file(base / "2_Dense" / "model.safetensors")["linear.weight"])


def test_settings_of_older_versions_mean_the_same(models, tmp_path):
    _, base, experts = models
    old = shutil.copytree(base, tmp_path / "old")
    settings = {"word_embedding_dimension": 24, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (old / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    modules = json.loads((old / "modules.json").read_text())
    for module in modules:
        module["type"] = "sentence_transformers.models." + module["type"].rpartition(".")[2]
    (old / "modules.json").write_text(json.dumps(modules))
    assert not [note for note in plan_merge(experts, base_model=old).notes if "modules" in note]


def test_a_saved_and_a_pushed_model_keep_the_modules(models, hub, tmp_path):
    _, base, experts = models
    merge(experts, tmp_path / "merged", base_model=base)
    expected = embeddings(tmp_path / "merged")
    AutoMergedModel.from_pretrained(tmp_path / "merged").save_pretrained(tmp_path / "saved")
    assert np.array_equal(embeddings(tmp_path / "saved"), expected)
    push(tmp_path / "merged", "sentences/merged")
    assert "2_Dense/model.safetensors" in hub.files("sentences/merged")
    assert np.array_equal(SentenceTransformer("sentences/merged", device="cpu").encode(TEXTS), expected)


def test_a_base_on_the_hub_gives_its_modules(models, hub, tmp_path):
    _, base, experts = models
    hub.add_folder("sentences/base", base)
    merge(experts, tmp_path / "merged", base_model="sentences/base")
    expected = embeddings(with_weights(base, tmp_path / "merged", tmp_path / "by-hand"))
    assert np.array_equal(embeddings(tmp_path / "merged"), expected)


@pytest.mark.parametrize("path", ["../outside", "/etc", "a/../../b"])
def test_modules_outside_the_model_are_refused(models, tmp_path, path):
    _, base, experts = models
    copy = shutil.copytree(base, tmp_path / "copy")
    modules = json.loads((copy / "modules.json").read_text())
    modules[1]["path"] = path
    (copy / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(MergeError, match=r"modules\.json names the folder .* outside the model's"):
        merge(experts, tmp_path / "merged", base_model=copy)


@pytest.mark.parametrize("path", [".", "./", ".//."])
def test_the_top_of_the_folder_is_no_folder_of_a_module_however_it_is_written(models, tmp_path, path):
    _, base, experts = models
    copy = shutil.copytree(base, tmp_path / "copy")
    modules = json.loads((copy / "modules.json").read_text())
    modules[0]["path"] = path
    (copy / "modules.json").write_text(json.dumps(modules))
    for model, folder in ((base, "expected"), (copy, "merged")):
        merge(experts, tmp_path / folder, base_model=model, max_shard_size="20KB")
    found, expected = (
        {file.relative_to(tmp_path / folder).as_posix() for file in (tmp_path / folder).rglob("*")}
        for folder in ("merged", "expected")
    )
    assert found == expected, "the base's own weights do not go along"


def test_links_out_of_a_module_are_refused(models, tmp_path):
    _, base, experts = models
    copy = shutil.copytree(base, tmp_path / "copy")
    (tmp_path / "secret.json").write_text("{}")
    (copy / "1_Pooling" / "more.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(MergeError, match=r"more\.json leads out of the model's folder"):
        merge(experts, tmp_path / "merged", base_model=copy)


@pytest.mark.parametrize("content", ["{}", "[1]", '[{"path": 3, "type": "x"}]', "["])
def test_a_damaged_list_of_modules_is_refused(models, tmp_path, content):
    _, base, experts = models
    copy = shutil.copytree(base, tmp_path / "copy")
    (copy / "modules.json").write_text(content)
    with pytest.raises(MergeError, match=r"modules\.json"):
        merge(experts, tmp_path / "merged", base_model=copy)
