"""A plan costs next to nothing, and a merge downloads each file once."""

import os
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch

from neuromerge_hf import MergeError, merge, plan_merge
from neuromerge_hf.storage.location import locate
from plans import WEIGHTS, save_as_bin, size_of_weights, weights_served
from tiny_models import save_adapter, save_fine_tune, save_llama


def test_planning_a_sharded_model_on_the_hub_transfers_less_than_a_hundredth_of_its_weights(hub, tmp_path):
    base = save_llama(tmp_path / "base", vocab_size=4000, hidden_size=512, intermediate_size=1376, shard="8MB")
    expert = save_fine_tune(base, tmp_path / "math", seed=1, shard="8MB")
    adapter = save_adapter(base, tmp_path / "code", seed=2, r=64)
    hub.add_folder("large/base", base)
    hub.add_folder("large/math", expert)
    hub.add_folder("large/code", adapter)
    weights = size_of_weights(base, expert, adapter)
    assert len(list(base.glob("model-*.safetensors"))) > 3
    assert weights > 60_000_000
    hub.forget_traffic()
    plan = plan_merge(["large/math", "large/code"], base_model="large/base")
    assert hub.bytes_served.total() < weights / 100
    for folder in (base, expert, adapter):
        served = sum(count for name, count in hub.bytes_served.items() if name.startswith(f"large/{folder.name}/"))
        assert served < size_of_weights(folder) / 100
    assert plan.bytes_to_download == weights


def test_planning_downloads_no_weights_and_a_merge_downloads_each_file_once(hub, models, publish, tmp_path):
    publish("once", "base", "sharded", "code")
    plan = plan_merge(["once/sharded", "once/code"], base_model="once/base")
    files = {
        f"once/{name}/{path.name}": path.stat().st_size
        for name in ("base", "sharded", "code")
        for path in (models / name).iterdir()
        if path.suffix == ".safetensors"
    }
    assert plan.bytes_to_download == sum(files.values())
    cached = list(Path(os.environ["HF_HOME"], "hub").glob("models--once--*/snapshots/*/*"))
    assert "config.json" in [path.name for path in cached]
    assert not [path for path in cached if path.suffix in WEIGHTS]
    headers = weights_served(hub)
    assert set(headers) == set(files)

    hub.forget_traffic()
    merge(["once/sharded", "once/code"], tmp_path / "merged", base_model="once/base")
    assert weights_served(hub) == {name: headers[name] + size for name, size in files.items()}
    for name in files:
        repository, _, file = name.rpartition("/")
        calls = [call for call in hub.requests if re.fullmatch(rf"GET /{repository}/resolve/\w+/{file}", call)]
        assert len(calls) == 3, "two for the header, and one for the whole file"


def test_files_in_the_cache_are_not_counted_and_not_asked_for(hub, publish, tmp_path):
    publish("cached", "base", "math", "sharded")
    before = plan_merge(["cached/math", "cached/sharded"], base_model="cached/base")
    merge(["cached/math"], tmp_path / "merged", base_model="cached/base")
    hub.forget_traffic()
    plan = plan_merge(["cached/math", "cached/sharded"], base_model="cached/base")
    assert 0 < plan.bytes_to_download < before.bytes_to_download
    assert {name.split("/")[1] for name in weights_served(hub)} == {"sharded"}
    merge(["cached/sharded"], tmp_path / "other", base_model="cached/base")
    hub.forget_traffic()
    assert plan_merge(["cached/math", "cached/sharded"], base_model="cached/base").bytes_to_download == 0
    assert weights_served(hub) == {}


def test_a_model_that_is_named_twice_is_downloaded_once(publish):
    publish("twice", "base", "math")
    one = plan_merge(["twice/math"], base_model="twice/base")
    two = plan_merge(["twice/math", "twice/math"], base_model="twice/base")
    assert one.bytes_to_download == two.bytes_to_download


def test_the_plan_is_the_same_from_the_hub_and_from_the_files(publish, models):
    publish("same-plan", "base", "math", "sharded", "code")
    names = ["math", "sharded", "code"]
    remote = plan_merge([f"same-plan/{name}" for name in names], base_model="same-plan/base")
    local = plan_merge([models / name for name in names], base_model=models / "base")
    for plan in (remote, local):
        assert [expert.kind for expert in plan.experts] == ["full", "full", "LoRA r=4"]
    for attribute in ("merged", "copied", "bytes_read", "bytes_written", "memory_needed", "seconds_needed"):
        assert getattr(remote, attribute) == getattr(local, attribute)
    assert [(unit.tensor.shape, unit.layout, unit.changing) for unit in remote.units] == [
        (unit.tensor.shape, unit.layout, unit.changing) for unit in local.units
    ]
    assert remote.disk_needed == remote.bytes_to_download + local.disk_needed


def test_a_weight_cannot_be_read_before_it_is_downloaded(publish):
    publish("unread", "base", "math")
    tensor = plan_merge(["unread/math"], base_model="unread/base").units[0].tensor
    with pytest.raises(RuntimeError, match="before it is downloaded"):
        tensor.read(0, 1, torch.empty(1))


def test_without_a_network_only_what_is_in_the_cache_can_be_planned(hub, publish, tmp_path, monkeypatch):
    publish("off", "base", "math", "sharded")
    merge(["off/sharded"], tmp_path / "merged", base_model="off/base")
    plan_merge(["off/math"], base_model="off/base")  # leaves its configuration in the cache
    hub.forget_traffic()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert plan_merge(["off/sharded"], base_model="off/base").bytes_to_download == 0
    with pytest.raises(MergeError, match=r"off/math.*the Hub cannot be reached"):
        plan_merge(["off/math"], base_model="off/base")
    assert hub.requests == []


@pytest.mark.parametrize("who", ["base", "math"])
def test_bin_files_are_downloaded_to_be_planned(hub, models, tmp_path, who):
    for name in ("base", "math", "sharded"):
        folder = save_as_bin(models, name, tmp_path / name) if name == who else models / name
        hub.add_folder(f"pickled-{who}/{name}", folder)
    hub.forget_traffic()
    experts = [f"pickled-{who}/math", f"pickled-{who}/sharded"]
    plan = plan_merge(experts, base_model=f"pickled-{who}/base")
    downloaded = f"pickled-{who}/{who}/pytorch_model.bin"
    size = len(hub.files(f"pickled-{who}/{who}")["pytorch_model.bin"])
    assert hub.bytes_served[downloaded] == size
    others = [models / name for name in ("base", "math", "sharded") if name != who]
    assert plan.bytes_to_download == size_of_weights(*others)
    assert [expert.name for expert in plan.experts] == ["math", "sharded"]
    [sentence] = [line for line in str(plan).splitlines() if ".bin" in line]
    assert f"pickled-{who}/{who}@" in sentence
    merge(experts, tmp_path / "merged", base_model=f"pickled-{who}/base")
    merge([models / "math", models / "sharded"], tmp_path / "local", base_model=models / "base")
    assert hub.bytes_served[downloaded] == size
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (
        tmp_path / "local" / "model.safetensors"
    ).read_bytes()


def test_bin_files_are_not_downloaded_for_a_merge_that_is_refused(hub, models, publish, tmp_path):
    publish("spared", "base", "bert")
    hub.add_folder("spared/math", save_as_bin(models, "math", tmp_path / "math"))
    with pytest.raises(MergeError, match="is a bert model"):
        plan_merge(["spared/math", "spared/bert"], base_model="spared/base")
    assert not hub.bytes_served["spared/math/pytorch_model.bin"]


def test_a_snapshot_without_weights_is_not_taken_for_a_model_without_weights(publish, monkeypatch):
    (name,) = publish("partial", "base")
    base = locate(name)
    shutil.rmtree(base.folder.parents[1] / "trees")  # the list of all files, which older clients do not keep
    monkeypatch.setattr("huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE", {})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MergeError, match="not in the Hub's cache, and the Hub cannot be reached"):
        locate(name).find_weights()
