"""A merge of files that are written again while it runs ends with an error and leaves nothing."""

import os
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from neuromerge_hf import AutoMergedModel, MergeError, api, merge, merge_recipe
from neuromerge_hf.assembly import assemble
from neuromerge_hf.planning import planner
from neuromerge_hf.storage.hashing import file_hash
from rewriting import WAYS, edit_unseen, rewrite
from tiny_models import contents, save_adapter, save_fine_tune, save_llama

CPU = {"device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    base = save_llama(root / "base", shard="40KB")
    save_fine_tune(base, root / "math", seed=1)
    save_fine_tune(base, root / "code", seed=2)
    for name in ("base", "math", "code"):
        (root / name / "LICENSE").write_text("Use it as you like.")
        (root / name / "README.md").write_text("---\nlicense: mit\n---\nA model.")
    (root / "base" / "additional_chat_templates").mkdir()
    (root / "base" / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    return root


@pytest.fixture
def models(originals, tmp_path):
    return Path(shutil.copytree(originals, tmp_path / "models"))


MOMENTS = {
    "after the plan": (planner, "check_disk"),
    "before a pass": (assemble, "fit_method"),
    "before the last pass": (assemble, "merge_weights"),
    "after the passes": (assemble, "save_heads"),
    "after the hashes": (assemble, "write_card"),
}
"""Functions that are called at a moment of a merge."""

EARLY = {
    "after the check of a recipe": (api, "resolve"),
    "before the hashes": (api, "InputHasher"),
    "while planning": (planner, "open_base"),
}


@pytest.fixture
def at_moment(monkeypatch):
    """A function that makes a change at a moment of the next merge."""

    def prepare(moment, change):
        module, name = (MOMENTS | EARLY)[moment]
        original = getattr(module, name)

        def changed(*arguments, **keywords):
            monkeypatch.setattr(module, name, original)
            change()
            return original(*arguments, **keywords)

        monkeypatch.setattr(module, name, changed)

    return prepare


def refused(file: Path, output: Path, models: Path, what: str = "has changed since it was opened for") -> None:
    with pytest.raises(MergeError) as caught:
        merge([models / "math", models / "code"], output, base_model=models / "base", overwrite=True, **CPU)
    assert str(caught.value) == (
        f"{file} {what} this merge. Run it again, and leave the files as they are while it runs."
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", ["base", "code"])
def test_a_file_that_changes_during_a_merge_ends_it(models, tmp_path, at_moment, name, moment, way):
    file = sorted((models / name).glob("*.safetensors"))[-1]
    at_moment(moment, lambda: rewrite(file, way))
    refused(file, tmp_path / "out" / "merged", models)
    assert contents(tmp_path / "out") == {}
    merge([models / "math", models / "code"], tmp_path / "out" / "merged", base_model=models / "base", **CPU)


def test_a_file_that_ends_early_is_said_to_have_changed(models, tmp_path, at_moment):
    file = models / "code" / "model.safetensors"
    at_moment("before a pass", lambda: file.write_bytes(file.read_bytes()[:5_000]))
    refused(file, tmp_path / "out" / "merged", models)


def test_a_file_that_is_removed_is_said_to_have_changed(models, tmp_path, at_moment):
    file = models / "math" / "model.safetensors"
    at_moment("after the passes", file.unlink)
    refused(file, tmp_path / "out" / "merged", models)


def test_an_older_merge_stays_in_its_place(models, tmp_path, at_moment):
    output = tmp_path / "out" / "merged"
    merge([models / "math"], output, base_model=models / "base", **CPU)
    before = contents(output)
    file = models / "math" / "model.safetensors"
    at_moment("before the last pass", lambda: rewrite(file, "in-place"))
    refused(file, output, models)
    assert contents(tmp_path / "out") == {f"merged/{name}": content for name, content in before.items()}


@pytest.mark.parametrize("way", WAYS)
def test_the_cache_keeps_no_merge_of_files_that_changed(models, tmp_path, at_moment, way):
    file = models / "math" / "model.safetensors"
    at_moment("before a pass", lambda: rewrite(file, way))
    with pytest.raises(MergeError, match="has changed since it was opened"):
        AutoMergedModel.from_pretrained(
            [models / "math"], base_model=models / "base", merge_cache_dir=tmp_path / "cache"
        )
    assert contents(tmp_path / "cache") == {}


@pytest.mark.parametrize("moment", ["before the hashes", "after the hashes"])
@pytest.mark.parametrize(
    "file",
    [
        "math/model.safetensors",
        "base/model.safetensors.index.json",
        "base/config.json",
        "base/generation_config.json",
        "base/tokenizer.json",
        "base/additional_chat_templates/tools.jinja",
        "base/README.md",
        "code/LICENSE",
    ],
)
def test_an_edit_that_keeps_size_and_time_is_noticed(models, tmp_path, at_moment, file, moment):
    at_moment(moment, lambda: edit_unseen(models / file))
    refused(models / file, tmp_path / "out" / "merged", models)
    assert contents(tmp_path / "out") == {}


def test_the_settings_of_an_adapter_are_those_whose_hash_is_recorded(models, tmp_path, at_moment):
    save_adapter(models / "base", models / "lora", seed=3)
    settings = models / "lora" / "adapter_config.json"
    changed = settings.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9')
    at_moment("before the hashes", lambda: settings.write_text(changed))
    with pytest.raises(MergeError, match=r"adapter_config\.json has changed since it was opened"):
        merge([models / "lora"], tmp_path / "out" / "merged", base_model=models / "base", **CPU)
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize("link", ["math", "math/model.safetensors"])
@pytest.mark.parametrize("back", [False, True])
def test_a_link_that_is_switched_is_noticed_even_if_it_is_switched_back(models, tmp_path, at_moment, link, back):
    (models / link).rename(models / "old")
    old, new = models / "old", models / "code" / Path(link).relative_to("math")
    (models / link).symlink_to(old)

    def switch(target):
        (models / "link").symlink_to(target)
        os.replace(models / "link", models / link)

    at_moment("before a pass", lambda: switch(new))
    if back:
        at_moment("after the hashes", lambda: switch(old))
    with pytest.raises(MergeError, match=r"math.* has changed since it was opened"):
        merge([models / "math"], tmp_path / "out" / "merged", base_model=models / "base", **CPU)
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_in_the_hubs_cache_that_is_switched_is_noticed(hub, models, tmp_path, at_moment, name):
    hub.add_folder("switched/math", models / "math")

    def switch():
        (link,) = Path(constants.HF_HUB_CACHE, "models--switched--math", "snapshots").glob(f"*/{name}")
        link.unlink()
        link.symlink_to(models / "code" / name)

    at_moment("before a pass", switch)
    with pytest.raises(MergeError, match=f"{name} has changed since it was opened"):
        merge(["switched/math"], tmp_path / "out" / "merged", base_model=models / "base", **CPU)
    assert contents(tmp_path / "out") == {}
    shutil.rmtree(Path(constants.HF_HUB_CACHE, "models--switched--math"))


@pytest.mark.parametrize("name", ["base/vocab.txt", "math/adapter_config.json", "base/model.safetensors"])
@pytest.mark.parametrize("moment", ["before the hashes", "after the hashes"])
def test_a_file_that_is_added_while_models_are_merged_is_noticed(models, tmp_path, at_moment, name, moment):
    at_moment(moment, lambda: (models / name).write_bytes(b"new"))
    refused(models / name, tmp_path / "out" / "merged", models, "was added since the start of")
    assert contents(tmp_path / "out") == {}


def test_an_error_in_the_plan_of_a_file_that_vanished_says_so(models, tmp_path, at_moment):
    file = models / "math" / "model.safetensors"
    at_moment("while planning", file.unlink)
    refused(file, tmp_path / "out" / "merged", models)


def test_a_recipe_is_not_made_again_from_files_that_changed_after_their_check(models, tmp_path, at_moment):
    merge([models / "math"], tmp_path / "first", base_model=models / "base", **CPU)
    at_moment("after the check of a recipe", lambda: edit_unseen(models / "math" / "model.safetensors"))
    with pytest.raises(MergeError, match=r"model\.safetensors has changed since the recipe was written: its blake3"):
        merge_recipe(tmp_path / "first" / "recipe.yaml", tmp_path / "out" / "merged", **CPU)
    assert contents(tmp_path / "out") == {}


def test_the_cache_has_no_merge_of_an_older_file_of_the_same_size_and_time(models, tmp_path):
    def merged():
        AutoMergedModel.from_pretrained(
            [models / "math"], base_model=models / "base", merge_cache_dir=tmp_path / "cache"
        )
        recipes = (tmp_path / "cache").glob("*/recipe.yaml")
        hashes = {yaml.safe_load(path.read_text())["models"][0]["blake3"]["model.safetensors"] for path in recipes}
        return len(hashes), file_hash(models / "math" / "model.safetensors", "blake3") in hashes

    assert merged() == (1, True)
    edit_unseen(models / "math" / "model.safetensors")
    assert merged() == (2, True)
    assert merged() == (2, True)


# An adapter beside a full model's weights


@pytest.fixture
def models_with_adapters(models):
    """A base of two shards and fine-tunes, each with an adapter in its folder that is not part of the merge."""
    save_adapter(models / "base", models / "adapter", seed=3)
    for name in ("base", "math"):
        shutil.copy(models / "adapter" / "adapter_model.safetensors", models / name)
    return models


@pytest.mark.parametrize("name", ["base", "math"])
def test_the_recipe_has_the_weights_of_a_full_model_whose_folder_holds_an_adapter(models_with_adapters, tmp_path, name):
    models, output = models_with_adapters, tmp_path / "merged"
    merge([models / "math"], output, base_model=models / "base", **CPU)
    content = yaml.safe_load((output / "recipe.yaml").read_text())
    recorded = {"base": content["base_model"], "math": content["models"][0]}[name]["blake3"]
    weights = {path.name: file_hash(path, "blake3") for path in (models / name).glob("model*.safetensors")}
    assert weights.items() <= recorded.items()
    assert "adapter_model.safetensors" not in recorded


@pytest.mark.parametrize("name", ["base", "math"])
def test_a_recipe_refuses_other_weights_of_a_model_whose_folder_holds_an_adapter(models_with_adapters, tmp_path, name):
    models, output = models_with_adapters, tmp_path / "merged"
    merge([models / "math"], output, base_model=models / "base", **CPU)
    file = sorted((models / name).glob("model*.safetensors"))[-1]
    edit_unseen(file)
    with pytest.raises(MergeError, match=f"{file.name} has changed since the recipe was written"):
        merge_recipe(output / "recipe.yaml", tmp_path / "again", **CPU)
    assert not (tmp_path / "again").exists()


def test_the_cache_knows_the_shards_of_a_base_whose_folder_holds_an_adapter(models_with_adapters, tmp_path):
    models = models_with_adapters

    def merged():
        AutoMergedModel.from_pretrained(
            [models / "math"], base_model=models / "base", merge_cache_dir=tmp_path / "cache"
        )
        return len(list((tmp_path / "cache").glob("*/recipe.yaml")))

    assert merged() == 1
    edit_unseen(sorted((models / "base").glob("model-*.safetensors"))[-1])
    assert merged() == 2
