"""Experts and bases are taken from the Hub: at a commit, only what is needed, and once."""

import json
import shutil

import huggingface_hub
import pytest
import torch
import yaml

from neuromerge_hf import AutoMergedModel, MergeError, merge, plan_merge
from tiny_models import contents, load, logits, save_bert, save_fine_tune, save_llama


@pytest.fixture
def publish(hub, models, tmp_path):
    """Put models on the hub under a namespace; adapters then name their base there."""

    def add(namespace: str, *names: str) -> list[str]:
        for name in names:
            folder = shutil.copytree(models / name, tmp_path / "published" / namespace / name)
            if (folder / "adapter_config.json").exists():
                text = (folder / "adapter_config.json").read_text()
                (folder / "adapter_config.json").write_text(text.replace(str(models / "base"), f"{namespace}/base"))
            hub.add_folder(f"{namespace}/{name}", folder)
        hub.forget_traffic()
        return [f"{namespace}/{name}" for name in names]

    return add


def weights(folder) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith(".safetensors")}


def recipe(folder) -> dict:
    return yaml.safe_load((folder / "recipe.yaml").read_text())


def test_models_on_the_hub_merge_like_local_ones(models, publish, tmp_path):
    names = ["math", "sharded", "code"]
    publish("same", "base", *names)
    report = merge([f"same/{name}" for name in names], tmp_path / "hub", base_model="same/base")
    merge([models / name for name in names], tmp_path / "local", base_model=models / "base")
    assert weights(tmp_path / "hub") == weights(tmp_path / "local")
    ours, local = contents(tmp_path / "hub"), contents(tmp_path / "local")
    assert {name for name in ours if ours[name] != local.get(name)} == {"recipe.yaml"}
    assert [expert.name for expert in report.experts] == names


def test_the_base_is_found_on_the_hub_from_the_adapter(publish, models, tmp_path):
    publish("found", "base", "code")
    report = merge(["found/code"], tmp_path / "merged")
    assert report.base_model.startswith("found/base@")
    merge([models / "code"], tmp_path / "local")
    assert weights(tmp_path / "merged") == weights(tmp_path / "local")


def test_a_base_that_the_hub_does_not_have_is_named_with_its_adapter(publish):
    publish("baseless", "code")
    with pytest.raises(MergeError, match=r"baseless/code@\w+ names its base 'baseless/base'.*base_model="):
        plan_merge(["baseless/code"])


def test_the_recipe_records_commits(hub, publish, models, tmp_path):
    publish("commits", "base", "math", "code")
    merge(["commits/math", "commits/code", models / "sharded"], tmp_path / "merged", base_model="commits/base")
    content = recipe(tmp_path / "merged")
    for entry, name in zip([content["base_model"], *content["models"]], ["base", "math", "code"], strict=False):
        assert entry == {"id": f"commits/{name}", "revision": hub.repos[f"commits/{name}"].resolve("main")}
    assert content["models"][2]["id"] == str(models / "sharded")
    assert "model.safetensors.index.json" in content["models"][2]["blake3"]


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, publish, models, tmp_path):
    publish("revisions", "base", "math")
    older = hub.repos["revisions/math"].resolve("main")
    newer = hub.add_folder("revisions/math", save_fine_tune(models / "base", tmp_path / "newer", seed=7))
    hub.repos["revisions/math"].branches["draft"] = newer
    hub.repos["revisions/math"].tags["v1"] = older
    made = {}
    for revision in ("v1", older, "draft", newer, None):
        output = tmp_path / f"merged-{revision}"
        merge([f"revisions/math@{revision}" if revision else "revisions/math"], output, base_model="revisions/base")
        made[revision] = weights(output), recipe(output)["models"][0]["revision"]
    assert made["v1"] == made[older] != made["draft"]
    assert made["draft"] == made[newer] == made[None]
    assert (made["v1"][1], made["draft"][1]) == (older, newer)


def test_the_bases_revision_is_the_one_that_the_adapter_names(hub, publish, models, tmp_path):
    publish("pinned", "base")
    older = hub.repos["pinned/base"].resolve("main")
    hub.add_folder("pinned/base", save_llama(tmp_path / "newer", seed=7))
    adapter = shutil.copytree(models / "code", tmp_path / "code")
    text = (adapter / "adapter_config.json").read_text().replace('"revision": null', f'"revision": "{older}"')
    (adapter / "adapter_config.json").write_text(text.replace(str(models / "base"), "pinned/base"))
    merge([adapter], tmp_path / "merged")
    assert recipe(tmp_path / "merged")["base_model"]["revision"] == older


def test_only_the_files_that_are_needed_are_downloaded(hub, models, tmp_path):
    folder = shutil.copytree(models / "math", tmp_path / "math")
    torch.save(load(folder).state_dict(), folder / "pytorch_model.bin")
    for name in ("consolidated.safetensors", "optimizer.bin", "flax_model.msgpack", "model.gguf", "onnx/model.onnx"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"large")
    hub.add_folder("thrifty/math", folder)
    hub.add_folder("thrifty/base", models / "base")
    hub.forget_traffic()
    merge(["thrifty/math"], tmp_path / "merged", base_model="thrifty/base")
    small = (".json", ".jinja", ".md")
    assert {name for name in hub.bytes_served if not name.endswith(small)} == {
        "thrifty/math/model.safetensors",
        "thrifty/base/model.safetensors",
    }
    served = hub.bytes_served.copy()
    merge(["thrifty/math"], tmp_path / "again", base_model="thrifty/base")
    assert hub.bytes_served == served, "the second merge finds everything in the cache"
    assert contents(tmp_path / "again") == contents(tmp_path / "merged")


def test_every_kind_of_tokenizer_comes_along(hub, models, tmp_path):
    folder = shutil.copytree(models / "base", tmp_path / "base")
    names = ["source.spm", "bpe.codes", "qwen.tiktoken", "spiece.model", "vocab.txt", "merges.txt"]
    for name in names:
        (folder / name).write_text(name)
    hub.add_folder("tokenizers/base", folder)
    merge([models / "math"], tmp_path / "local", base_model=folder)
    merge([models / "math"], tmp_path / "hub", base_model="tokenizers/base")
    for output in ("local", "hub"):
        assert {name: (tmp_path / output / name).read_text() for name in names} == dict(zip(names, names, strict=True))


@pytest.mark.parametrize("name", ["model", "shards"])
def test_bin_files_are_downloaded_where_there_are_no_safetensors(hub, models, tmp_path, name):
    folder = shutil.copytree(models / "math", tmp_path / "math")
    state = load(folder).state_dict()
    (folder / "model.safetensors").unlink()
    if name == "model":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        half = dict(list(state.items())[::2])
        torch.save(half, folder / "first.bin")
        torch.save({key: tensor for key, tensor in state.items() if key not in half}, folder / "second.bin")
        files = {key: "first.bin" if key in half else "second.bin" for key in state}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "training_args.bin").write_bytes(b"not weights")
    hub.add_folder(f"pickles/{name}", folder)
    merge([f"pickles/{name}"], tmp_path / "merged", base_model=models / "base")
    merge([models / "math"], tmp_path / "expected", base_model=models / "base")
    assert weights(tmp_path / "merged") == weights(tmp_path / "expected")
    assert not hub.bytes_served[f"pickles/{name}/training_args.bin"]


def test_a_missing_shard_on_the_hub_is_refused(hub, models, tmp_path):
    folder = shutil.copytree(models / "sharded", tmp_path / "sharded")
    (folder / "model-00002-of-00004.safetensors").unlink()
    hub.add_folder("broken/sharded", folder)
    with pytest.raises(MergeError, match=r"model-00002-of-00004\.safetensors is missing"):
        plan_merge(["broken/sharded"], base_model=models / "base")


def test_heads_of_experts_on_the_hub_are_kept(hub, tmp_path):
    base = save_bert(tmp_path / "base")
    expert = save_fine_tune(
        base, tmp_path / "topics", seed=1, model_class="BertForSequenceClassification", num_labels=3
    )
    hub.add_folder("heads/base", base)
    hub.add_folder("heads/topics", expert)
    report = merge(["heads/topics"], tmp_path / "merged", base_model="heads/base")
    assert report.experts[0].head == ["classifier.bias", "classifier.weight"]
    assert (tmp_path / "merged" / "heads" / "topics" / "head.safetensors").is_file()


def test_experts_of_the_same_name_are_told_apart(publish, tmp_path):
    publish("one", "base", "math")
    publish("two", "math")
    report = merge(["one/math", "two/math", "two/math"], tmp_path / "merged", base_model="one/base")
    assert [expert.name for expert in report.experts] == ["math", "math-2", "math-3"]


def test_a_gated_base_says_how_to_get_in(hub, models):
    hub.add_folder("locked/base", models / "base", gated=True)
    for token in (None, False, "hf_other"):
        with pytest.raises(MergeError, match=r"locked/base is gated: accept its terms.*hf auth login.*token="):
            plan_merge([models / "math"], base_model="locked/base", token=token)


def test_a_private_model_looks_like_a_missing_one(hub, models):
    with pytest.raises(MergeError, match=r"for a private model log in with `hf auth login` or pass token="):
        plan_merge(["locked/private"], base_model=models / "base", token=False)


def test_a_merge_of_cached_models_needs_no_network(hub, publish, tmp_path, monkeypatch):
    publish("offline", "base", "math", "code")
    merge(["offline/math", "offline/code"], tmp_path / "online")
    hub.forget_traffic()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    merge(["offline/math", "offline/code"], tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "online")
    model = AutoMergedModel.from_pretrained(["offline/code"], merge_cache_dir=tmp_path / "cache")
    assert type(model).__name__ == "LlamaForCausalLM"
    with pytest.raises(MergeError, match=r"offline/never-seen.*not in the Hub's cache"):
        merge(["offline/never-seen"], tmp_path / "other", base_model="offline/base")
    assert hub.requests == []


def test_local_files_only_asks_the_hub_nothing(hub, publish, tmp_path):
    publish("local", "base", "code")
    with pytest.raises(MergeError, match=r"local/code is not a folder .* local_files_only=True .*forbids a download"):
        merge(["local/code"], tmp_path / "merged", local_files_only=True)
    assert hub.requests == []
    merge(["local/code"], tmp_path / "online")
    hub.forget_traffic()
    merge(["local/code"], tmp_path / "merged", local_files_only=True)
    assert contents(tmp_path / "merged") == contents(tmp_path / "online")
    AutoMergedModel.from_pretrained(["local/code"], local_files_only=True, merge_cache_dir=tmp_path / "kept")
    assert hub.requests == []


def test_a_cache_of_ones_own_takes_the_downloads(publish, tmp_path):
    publish("own-cache", "base", "code")
    options = {"cache_dir": tmp_path / "hub", "merge_cache_dir": tmp_path / "kept"}
    model = AutoMergedModel.from_pretrained(["own-cache/code"], **options)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {path.name for path in (tmp_path / "hub").glob("models--*")} == {
        "models--own-cache--base",
        "models--own-cache--code",
    }
    with pytest.raises(MergeError, match=r"cache_dir=.* is no path that can be used here"):
        plan_merge(["own-cache/code"], cache_dir=" \0")


def test_force_download_downloads_again(hub, publish, tmp_path):
    publish("again", "base", "code")
    merge(["again/code"], tmp_path / "first")
    hub.forget_traffic()
    merge(["again/code"], tmp_path / "second")
    file = "adapter_model.safetensors"
    assert not any(file in request for request in hub.requests if request.startswith("GET"))
    merge(["again/code"], tmp_path / "third", force_download=True)
    assert any(file in request for request in hub.requests if request.startswith("GET"))


def test_the_merged_model_of_hub_models_loads(publish, tmp_path):
    publish("loads", "base", "code")
    merge(["loads/code"], tmp_path / "merged")
    assert logits(load(tmp_path / "merged")).isfinite().all()
