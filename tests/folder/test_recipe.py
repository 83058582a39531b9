"""The recipe that a merge writes makes the same bytes again, from the same inputs or not at all."""

import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from neuromerge_hf import MergeError, NeuroIsoConfig, NeuroMergingConfig, merge, merge_recipe
from neuromerge_hf.engine.cpu_kernel import kernel_name
from neuromerge_hf.folder.inputs import InputHasher
from neuromerge_hf.folder.recipe import published_recipe
from neuromerge_hf.folder.report import load_report
from neuromerge_hf.spec import MergeSpec
from neuromerge_hf.storage.hashing import file_hash
from neuromerge_hf.storage.location import Location
from tiny_models import contents, save_adapter, save_bert, save_fine_tune, save_llama, save_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    llama = save_llama(root / "llama", dtype="bfloat16")
    save_fine_tune(llama, root / "math", seed=1, shard="10KB")
    save_adapter(llama, root / "code", seed=2, use_rslora=True)
    bert = save_bert(root / "bert")
    task = {"model_class": "BertForSequenceClassification", "num_labels": 3}
    save_fine_tune(bert, root / "topics", seed=3, **task)
    save_adapter(bert, root / "spam", seed=4, task_type="SEQ_CLS", **task)
    return root


@pytest.fixture
def copied(models, tmp_path):
    def copy(*names: str):
        return [shutil.copytree(models / name, tmp_path / "models" / name) for name in names]

    return copy


SETTINGS = {
    "defaults": {},
    "everything": {
        "config": NeuroMergingConfig(
            density=0.1 + 0.2, lambda_parallel=0.25, lambda_orthogonal=1 / 3, exclude=("*[nN]orm*",)
        ),
        "dtype": "float16",
        "max_shard_size": "15KB",
    },
    "whole": {"config": NeuroMergingConfig(density=1, exclude=["*.1.*"]), "max_shard_size": 15_000},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("base", "experts"), [("llama", ["math", "code"]), ("bert", ["topics", "spam"])])
@pytest.mark.parametrize("place", ["local", "hub"])
def test_the_recipe_reproduces_every_byte(hub, models, tmp_path, base, experts, settings, place):
    names = {name: str(models / name) for name in (base, *experts)}
    if place == "hub":
        for name in (base, experts[0]):
            names[name] = f"recipes/{name}"
            hub.add_folder(names[name], models / name)
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    merge([names[expert] for expert in experts], first, base_model=names[base], **settings)
    merge_recipe(first / "recipe.yaml", second, threads=1)
    merge_recipe(second / "recipe.yaml", third, threads=3)
    made = contents(first)
    assert ("heads/topics/head.safetensors" in made) == (base == "bert")
    assert ("model.safetensors.index.json" in made) == ("max_shard_size" in settings)
    assert contents(second) == made
    assert contents(third) == made


def test_a_recipe_of_hub_models_stays_with_their_commits(hub, models, tmp_path):
    hub.add_folder("moving/math", models / "math")
    hub.add_folder("moving/llama", models / "llama")
    merge(["moving/math"], tmp_path / "first", base_model="moving/llama")
    hub.add_folder("moving/math", save_fine_tune(models / "llama", tmp_path / "newer", seed=9))
    merge_recipe(tmp_path / "first" / "recipe.yaml", tmp_path / "second")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_the_recipe_says_everything_and_no_more(models, tmp_path):
    merge([models / "math", models / "code"], tmp_path / "merged", base_model=models / "llama", dtype="float32")
    text = (tmp_path / "merged" / "recipe.yaml").read_text()
    assert "neuromerge merge recipe.yaml --output" in text
    content = yaml.safe_load(text)
    apart = {"models", "names", "base_model", "config", "tuned_on"}
    settings = ["method", "config", *(each.name for each in fields(MergeSpec) if each.name not in apart)]
    assert list(content) == ["base_model", "models", *settings, "versions"]
    assert (content["method"], content["config"]) == ("neuro_iso", NeuroIsoConfig().to_dict())
    defaults = {each.name: each.default for each in fields(MergeSpec)}
    assert {name: content[name] for name in settings[2:]} == {
        **{name: defaults[name] for name in settings[2:]},
        "dtype": "float32",
    }
    kernel = {kernel_name("cpu")}
    assert set(content["versions"]) == {"neuromerge-hf", "torch", "transformers", "peft", "safetensors"} | kernel
    base, math, code = content["base_model"], *content["models"]
    assert (base["id"], math["id"], code["id"]) == tuple(str(models / name) for name in ("llama", "math", "code"))
    assert set(base["blake3"]) == {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {"config.json", "model.safetensors.index.json"} < set(math["blake3"])
    assert set(code["blake3"]) == {"adapter_config.json", "adapter_model.safetensors"}
    for entry in (base, math, code):
        assert "revision" not in entry
        for name, digest in entry["blake3"].items():
            assert digest == file_hash(models / entry["id"] / name, "blake3")


def test_a_published_recipe_calls_folders_by_their_names_and_makes_the_model_again(models, tmp_path, monkeypatch, hub):
    commit = hub.add_folder("org/published-base", models / "bert")
    (tmp_path / "private").mkdir()
    experts = [shutil.copytree(models / "topics", tmp_path / side / "topics") for side in ("private", "secret")]
    save_tokenizer(experts[1])
    merge(experts, tmp_path / "merged", base_model="org/published-base", tokenizer=str(experts[1]))
    names = load_report(tmp_path / "merged").model_names
    text = published_recipe(tmp_path / "merged", names)
    content = yaml.safe_load(text)
    assert content["base_model"] == {"id": "org/published-base", "revision": commit}
    assert [model["id"] for model in content["models"]] == ["topics", "topics-2"]
    assert content["tokenizer"] == "topics-2"
    assert str(tmp_path) not in text

    public = tmp_path / "public"
    for expert, name in zip(experts, names[1:], strict=True):
        shutil.copytree(expert, public / name)
    (public / "recipe.yaml").write_text(text)
    monkeypatch.chdir(public)
    merge_recipe("recipe.yaml", "again")
    for name, data in contents(tmp_path / "merged").items():
        assert name == "recipe.yaml" or data == (public / "again" / name).read_bytes(), name


def test_no_file_names_a_place_that_the_user_did_not_write(models, tmp_path, monkeypatch):
    monkeypatch.chdir(models)
    merge(["topics", "./spam"], tmp_path / "merged", base_model="bert")
    content = yaml.safe_load((tmp_path / "merged" / "recipe.yaml").read_text())
    assert [content["base_model"]["id"], *(model["id"] for model in content["models"])] == ["bert", "topics", "./spam"]
    for name, data in contents(tmp_path / "merged").items():
        assert str(tmp_path).encode() not in data, name
        assert str(models).encode() not in data, name
    merge_recipe(tmp_path / "merged" / "recipe.yaml", tmp_path / "again")
    assert contents(tmp_path / "merged") == contents(tmp_path / "again")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MergeError, match=r"bert/config\.json is missing.*current folder"):
        merge_recipe(tmp_path / "merged" / "recipe.yaml", tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("math", "model-00001-of-*.safetensors"),
        ("math", "config.json"),
        ("code", "adapter_model.safetensors"),
        ("code", "adapter_config.json"),
        ("llama", "model.safetensors"),
        ("llama", "tokenizer.json"),
    ],
)
def test_a_changed_input_is_refused_with_both_hashes(copied, tmp_path, model, file):
    llama, math, code = copied("llama", "math", "code")
    merge([math, code], tmp_path / "merged", base_model=llama)
    (changed,) = (tmp_path / "models" / model).glob(file)
    before = file_hash(changed, "blake3")
    changed.write_bytes(changed.read_bytes() + b" ")
    with pytest.raises(MergeError) as caught:
        merge_recipe(tmp_path / "merged" / "recipe.yaml", tmp_path / "again")
    for part in (changed, before, file_hash(changed, "blake3"), "has changed since the recipe was written"):
        assert str(part) in str(caught.value)
    assert not (tmp_path / "again").exists()


def test_a_recipe_of_an_earlier_version_is_held_to_its_sha256(copied, tmp_path):
    llama, math = copied("llama", "math")
    merge([math], tmp_path / "merged", base_model=llama)
    recipe = tmp_path / "merged" / "recipe.yaml"
    content = yaml.safe_load(recipe.read_text())
    for model in (content["base_model"], *content["models"]):
        model["sha256"] = {name: file_hash(Path(model["id"], name), "sha256") for name in model.pop("blake3")}
    recipe.write_text(yaml.safe_dump(content))
    merge_recipe(recipe, tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    assert yaml.safe_load((tmp_path / "again" / "recipe.yaml").read_text())["models"] == content["models"]
    (math / "config.json").write_text("{}")
    with pytest.raises(MergeError, match="its sha256 is"):
        merge_recipe(recipe, tmp_path / "third")


def test_every_changed_or_missing_input_is_listed(copied, tmp_path):
    llama, math, code = copied("llama", "math", "code")
    merge([math, code], tmp_path / "merged", base_model=llama)
    (math / "config.json").write_text("{}")
    (code / "adapter_model.safetensors").unlink()
    with pytest.raises(MergeError) as caught:
        merge_recipe(tmp_path / "merged" / "recipe.yaml", tmp_path / "again")
    assert len(caught.value.problems) == 2
    assert str(math / "config.json") in str(caught.value)
    assert f"{code / 'adapter_model.safetensors'} is missing" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "just a sentence",
        "[1, 2]",
        "{",
        "base_model: {id: a}\n",
        "base_model: 3\nmodels: []\nconfig: {}\ndtype: auto\nmax_shard_size: 5GB\n",
        "base_model: {id: 3}\nmodels: [{id: b}]\nconfig: {}\ndtype: auto\nmax_shard_size: 5GB\n",
        "base_model: {id: a, sha256: x}\nmodels: [{id: b}]\nconfig: {}\ndtype: auto\nmax_shard_size: 5GB\n",
        "base_model: {id: a}\nmodels: 3\nconfig: {}\ndtype: auto\nmax_shard_size: 5GB\n",
        "base_model: {id: a}\nmodels: [{id: a, weight: 3}]\nconfig: {}\ndtype: auto\nmax_shard_size: 5GB\n",
        "base_model: {id: a}\nmodels: []\nconfig: {sparsity: 3}\ndtype: auto\nmax_shard_size: 5GB\n",
        "!!python/object/apply:os.mkdir [executed]",
    ],
)
def test_a_damaged_recipe_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(MergeError, match=r"recipe\.yaml is not a recipe that `neuromerge merge` wrote: .{5}"):
        merge_recipe("recipe.yaml", "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_recipe_that_was_cut_off_is_refused(models, tmp_path):
    merge([models / "code"], tmp_path / "merged")
    lines = (tmp_path / "merged" / "recipe.yaml").read_text().splitlines(keepends=True)
    for stop in range(lines.index("versions:\n")):
        (tmp_path / "cut.yaml").write_text("".join(lines[:stop]))
        with pytest.raises(MergeError, match=r"cut\.yaml is not a recipe that `neuromerge merge` wrote"):
            merge_recipe(tmp_path / "cut.yaml", tmp_path / "again")


def test_a_recipe_without_an_option_that_came_later_takes_its_default(models, tmp_path):
    merge([models / "code"], tmp_path / "merged")
    text = (tmp_path / "merged" / "recipe.yaml").read_text()
    assert "merge_heads: false\n" in text
    (tmp_path / "old.yaml").write_text(text.replace("merge_heads: false\n", ""))
    merge_recipe(tmp_path / "old.yaml", tmp_path / "again")
    assert contents(tmp_path / "merged") == contents(tmp_path / "again")


def test_a_recipe_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(MergeError, match=r"recipe\.yaml cannot be read: .*utf-8"):
        merge_recipe(tmp_path / "recipe.yaml", tmp_path / "merged")


def test_a_recipe_with_a_value_out_of_range_is_refused(models, tmp_path):
    merge([models / "code"], tmp_path / "merged")
    path = tmp_path / "merged" / "recipe.yaml"
    path.write_text(path.read_text().replace("density: 0.2", "density: 2"))
    with pytest.raises(MergeError, match=r"recipe\.yaml: density must be a number with 0 < density <= 1, not 2"):
        merge_recipe(path, tmp_path / "again")


def test_a_merge_that_fails_does_not_wait_for_the_hashes(models, tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(10**12)  # hashing this hole would take ten minutes
    with pytest.raises(MergeError), InputHasher(Location("base", models / "base"), [Location("big", tmp_path)]):
        raise MergeError("something is wrong")


def test_a_missing_recipe_is_refused(tmp_path):
    with pytest.raises(MergeError, match=r"missing\.yaml cannot be read: No such file"):
        merge_recipe(tmp_path / "missing.yaml", tmp_path / "merged")
