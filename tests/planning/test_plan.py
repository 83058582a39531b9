"""A plan is made from metadata: it costs next to nothing, finds all that is wrong, and says what a merge does."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from neuromerge_hf import AutoMergedModel, MergeError, NeuroMergingConfig, merge, plan_merge
from neuromerge_hf.cli import app
from neuromerge_hf.engine.merge import merge_weights
from neuromerge_hf.engine.writer import CheckpointWriter
from neuromerge_hf.methods import fit_method
from neuromerge_hf.text import readable_size
from tiny_models import contents, save_adapter, save_bert, save_fine_tune, save_llama

WEIGHTS = (".safetensors", ".bin")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    base = save_llama(root / "base")
    save_fine_tune(base, root / "math", seed=1)
    save_fine_tune(base, root / "sharded", seed=2, shard="20KB")
    save_adapter(base, root / "code", seed=3)
    bert = save_bert(root / "bert")
    save_fine_tune(bert, root / "topics", seed=1, model_class="BertForSequenceClassification", num_labels=3)
    return root


@pytest.fixture
def publish(hub, models):
    """Put models on the hub under a namespace."""

    def add(namespace: str, *names: str) -> list[str]:
        for name in names:
            hub.add_folder(f"{namespace}/{name}", models / name)
        hub.forget_traffic()
        return [f"{namespace}/{name}" for name in names]

    return add


@pytest.fixture
def changed(models, tmp_path):
    """A copy of a model with a change to its tensors."""

    def change(name: str, edit) -> Path:
        folder = shutil.copytree(models / name, tmp_path / "changed" / name)
        file = next(folder.glob("*.safetensors"))
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        return folder

    return change


def size_of_weights(*folders: Path) -> int:
    return sum(path.stat().st_size for folder in folders for path in folder.iterdir() if path.suffix in WEIGHTS)


def weights_served(hub) -> dict[str, int]:
    return {name: count for name, count in hub.bytes_served.items() if name.endswith(WEIGHTS)}


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# ----------------------------------------------------------------------------------------------------------- traffic


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
    cache = Path(os.environ["HF_HOME"], "hub")
    assert not [path for path in cache.glob("models--once--*/snapshots/*/*") if path.suffix in WEIGHTS]
    headers = weights_served(hub)
    assert set(headers) == set(files)

    hub.forget_traffic()
    merge(["once/sharded", "once/code"], tmp_path / "merged", base_model="once/base")
    assert weights_served(hub) == {name: headers[name] + size for name, size in files.items()}
    assert all(hub.requests.count(f"GET /{name}") <= 3 for name in files)


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


OFFLINE = """
import sys
from neuromerge_hf import MergeError, plan_merge
print(plan_merge(["off/sharded"], base_model="off/base").bytes_to_download)
try:
    plan_merge(["off/math"], base_model="off/base")
except MergeError as error:
    print(error)
"""


def test_without_a_network_only_what_is_in_the_cache_can_be_planned(hub, publish, tmp_path):
    publish("off", "base", "math", "sharded")
    merge(["off/sharded"], tmp_path / "merged", base_model="off/base")
    plan_merge(["off/math"], base_model="off/base")  # leaves its configuration in the cache
    hub.forget_traffic()
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    planned, message = done.stdout.strip().splitlines()
    assert planned == "0"
    assert "off/math" in message
    assert "the Hub cannot be reached" in message
    assert hub.requests == []


# ---------------------------------------------------------------------------------------------------------- problems


def damage_shape(tensors):
    tensors["model.norm.weight"] = torch.zeros(31)


def drop_parameter(tensors):
    del tensors["model.norm.weight"]


def quantise(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)


def drop_factor(tensors):
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]


def shrink_factor(tensors):
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"] = torch.zeros(30, 4)


@pytest.mark.parametrize(
    ("name", "edit", "says"),
    [
        ("math", damage_shape, r"The shapes differ: model\.norm\.weight is \(31,\).*but \(32,\) in the base's"),
        ("math", drop_parameter, r"lacks the parameter model\.norm\.weight"),
        ("math", quantise, r"model\.norm\.weight is torch\.int8.*save the expert in float32"),
        ("code", drop_factor, r"only one of lora_A and lora_B of model\.layers\.0\.self_attn\.q_proj"),
        ("code", shrink_factor, r"lora_B \(30, 4\).*do not fit.*Check base_model"),
    ],
)
def test_what_a_header_tells_is_found_before_any_weight_is_downloaded(
    hub, models, publish, changed, tmp_path, name, edit, says
):
    expert = f"header-{edit.__name__}/{name}".replace("_", "-")
    hub.add_folder(expert, changed(name, edit))
    [base] = publish(expert.partition("/")[0], "base")
    for call in (plan_merge, lambda *args, **kwargs: merge(*args, tmp_path / "merged", **kwargs)):
        with pytest.raises(MergeError, match=says):
            call([expert], base_model=base)
    assert not (tmp_path / "merged").exists()
    for path, served in weights_served(hub).items():
        repository, _, file = path.rpartition("/")
        header = 8 + int.from_bytes(hub.files(repository)[file][:8], "little")
        assert served == 2 * header, "the header, for the plan and for the merge"


def test_a_file_that_is_no_safetensors_is_found_by_its_first_bytes(hub, models, publish, tmp_path):
    publish("pointer", "base")
    folder = shutil.copytree(models / "math", tmp_path / "math")
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1" * 1000)
    hub.add_folder("pointer/math", folder)
    with pytest.raises(MergeError, match=r"model\.safetensors is not a valid safetensors file .*Git LFS"):
        plan_merge(["pointer/math"], base_model="pointer/base")
    (folder / "model.safetensors").write_bytes((models / "math" / "model.safetensors").read_bytes()[:-4])
    hub.add_folder("pointer/math", folder)
    with pytest.raises(MergeError, match=r"model\.safetensors is truncated"):
        plan_merge(["pointer/math"], base_model="pointer/base")
    (folder / "model.safetensors").write_bytes(b"")
    hub.add_folder("pointer/math", folder)
    with pytest.raises(MergeError, match=r"model\.safetensors is truncated"):
        plan_merge(["pointer/math"], base_model="pointer/base")


def test_everything_that_is_wrong_is_in_one_error(hub, models, publish, changed, tmp_path):
    """A repository, a folder, a kind of adapter, an architecture, a header, an option and the output directory."""
    publish("wrong", "base", "math", "bert")
    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2).save_pretrained(tmp_path / "prompt")
    hub.add_folder("wrong/prompt", tmp_path / "prompt")
    hub.add_folder("wrong/shape", changed("math", damage_shape))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    hub.forget_traffic()
    experts = ["wrong/missing", "./gone", "wrong/prompt", "wrong/bert", "wrong/shape", "wrong/math"]
    arguments = {"base_model": "wrong/base", "config": NeuroMergingConfig(exclude=("decoder.*",)), "dtype": "int8"}
    expected = [
        r"full exists and is not empty.*overwrite=True",
        r"wrong/missing is neither a folder.*Check the spelling",
        r"\./gone is not a folder",
        r"wrong/prompt@\w+ is an adapter of type PROMPT_TUNING.*Leave it out",
        r"dtype must be",
        r"wrong/bert@\w+ is a bert model.*Only fine-tunes of the same base",
        r"The shapes differ: model\.norm\.weight.*check base_model",
        r"exclude=\['decoder\.\*'\] matches no parameter",
    ]
    with pytest.raises(MergeError) as planned:
        plan_merge(experts, output_dir=tmp_path / "full", **arguments)
    with pytest.raises(MergeError) as merged:
        merge(experts, tmp_path / "full", **arguments)
    for error in (planned.value, merged.value):
        assert len(error.problems) == len(expected)
        for problem, pattern in zip(error.problems, expected, strict=True):
            assert re.search(pattern, problem), (pattern, problem)
    with pytest.raises(MergeError) as loaded:
        AutoMergedModel.from_pretrained(experts, base_model="wrong/base")
    assert len(loaded.value.problems) == 5
    assert not [name for name, count in weights_served(hub).items() if count > 8000]


def test_a_missing_base_does_not_hide_what_is_wrong_with_the_experts(tmp_path):
    with pytest.raises(MergeError) as caught:
        plan_merge(["./gone"], base_model="nobody/base", output_dir=tmp_path)
    assert [problem.partition(" is ")[0] for problem in caught.value.problems] == ["./gone", "nobody/base"]


def test_an_output_that_would_replace_a_model_or_does_not_fit_is_found_by_the_plan(models, tmp_path, monkeypatch):
    base = shutil.copytree(models / "base", tmp_path / "base")
    with pytest.raises(MergeError, match="holds the model"):
        plan_merge([models / "math"], base_model=base, output_dir=base, overwrite=True)
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(MergeError, match=r"72\.3 kB are needed, but only 1 kB are free in .*Free some space"):
        plan_merge([models / "math"], base_model=base, output_dir=tmp_path / "new" / "merged")
    assert not (tmp_path / "new").exists()


def test_an_output_inside_a_file_or_a_folder_that_may_not_be_written_is_found_by_the_plan(models, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "locked").mkdir(mode=0o500)
    outputs = [tmp_path / "notes.txt" / "merged"]
    if not os.access(tmp_path / "locked", os.W_OK):  # root may write everywhere
        outputs.append(tmp_path / "locked" / "merged")
    for output in outputs:
        with pytest.raises(MergeError, match=rf"{output} cannot be written: {output.parent}"):
            plan_merge([models / "math"], base_model=models / "base", output_dir=output)


def test_the_disk_must_hold_the_downloads_as_well(models, publish, tmp_path, monkeypatch):
    publish("disk", "base", "math")
    plan = plan_merge(["disk/math"], base_model="disk/base")
    assert plan.disk_needed == size_of_weights(models / "base", models / "math") + plan.bytes_written
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, plan.disk_needed - 1))
    with pytest.raises(MergeError, match="No space on the disk"):
        plan_merge(["disk/math"], base_model="disk/base", output_dir=tmp_path / "merged")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, plan.disk_needed))
    plan_merge(["disk/math"], base_model="disk/base", output_dir=tmp_path / "merged")


# ----------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_a_merge_reads_and_writes_what_its_plan_says(models, tmp_path, density):
    config = NeuroMergingConfig(density=density, exclude=("lm_head*",))
    experts = [models / "math", models / "code"]
    plan = plan_merge(experts, base_model=models / "base", config=config, threads=1)
    read: list[int] = []
    writer = CheckpointWriter(tmp_path, plan.units, "5GB")
    method = fit_method(plan, torch.device("cpu"), 1, read.append)
    merge_weights(plan, method, writer, torch.device("cpu"), 1, read.append)
    writer.close()
    assert sum(read) == plan.bytes_read

    report = merge(experts, tmp_path / "merged", base_model=models / "base", config=config)
    assert (report.bytes_read, report.bytes_written) == (plan.bytes_read, plan.bytes_written)
    assert (report.merged, report.copied) == (plan.merged, plan.copied)
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert sum(tensor.nbytes for tensor in written.values()) == plan.bytes_written
    assert plan.copied == ["lm_head.weight"]


def test_heads_are_part_of_what_is_written(models, tmp_path):
    plan = plan_merge([models / "topics"], base_model=models / "bert")
    merge([models / "topics"], tmp_path / "merged", base_model=models / "bert")
    files = [tmp_path / "merged" / "model.safetensors", tmp_path / "merged" / "heads" / "topics" / "head.safetensors"]
    written = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert plan.bytes_written == plan.disk_needed == written
    assert "own head, kept apart: classifier.bias, classifier.weight" in str(plan)


def test_more_experts_threads_and_a_lower_density_cost_more(models):
    def costs(experts, density, threads):
        config = NeuroMergingConfig(density=density)
        plan = plan_merge(experts, base_model=models / "base", config=config, threads=threads)
        return plan.memory_needed, plan.seconds_needed

    one = costs([models / "math"], 1.0, 1)
    assert costs([models / "math", models / "sharded"], 1.0, 1) > one
    assert costs([models / "math"], 0.2, 1) > one
    memory, seconds = costs([models / "math"], 1.0, 2)
    assert memory > one[0]
    assert seconds < one[1]


# ------------------------------------------------------------------------------------------------------ command line


def test_the_command_prints_the_plan_and_the_merge_keeps_it(hub, models, publish, tmp_path):
    publish("printed", "base", "math")
    arguments = ["printed/math", models / "code", "--base-model", "printed/base", "--exclude", "lm_head.*"]
    done = run("plan", *arguments, "--output", tmp_path / "merged", "--threads", 2)
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "merged").exists()
    commit = hub.repos["printed/base"].resolve("main")[:8]
    download = size_of_weights(models / "base", models / "math")
    for line in (
        f"2 experts into printed/base@{commit}:",
        f"  code (LoRA r=4), {models / 'code'}: may change 14 parameters",
        "  merged: 20 parameters, 15 by neurons, 5 by single entries",
        "  copied from the base: 1 parameter (lm_head.weight)",
        f"  to download: {readable_size(download)}",
        f"  disk needed: {readable_size(download + 72_320)}",
    ):
        assert line in done.stdout.splitlines()
    assert re.search(r"math \(full\), printed/math@\w{8}: may change 20 parameters", done.stdout)
    assert re.search(r"memory needed: about 3\d\d MB", done.stdout)
    assert re.search(r"very roughly \d+ s with threads=2", done.stdout)

    merged = run("merge", *arguments, "--output", tmp_path / "merged").stdout
    for planned, done_ in (("read", "read"), ("write", "written")):
        [size] = re.findall(rf"  to {planned}: (.*)", done.stdout)
        assert f"{size} {done_}" in merged
    recipe = run("plan", tmp_path / "merged" / "recipe.yaml", "--threads", 2)
    assert recipe.stdout == done.stdout.replace(readable_size(download), "0 B").replace(
        readable_size(download + 72_320), readable_size(72_320)
    )


def test_the_command_lists_all_problems(models, tmp_path):
    (tmp_path / "merged").write_text("mine")
    done = run("plan", "./gone", models / "bert", "--base-model", models / "base", "--output", tmp_path / "merged")
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: 3 problems were found:\n  * ")
    for part in ("is a file", "./gone is not a folder", "is a bert model"):
        assert part in done.stderr
    for arguments, message in (
        (["missing.yaml"], "The recipe missing.yaml cannot be read"),
        ([models / "code", "--density", "2"], "density must be a number"),
        (["x.yaml", "--density", "0.5"], "leave --density out"),
    ):
        done = run("plan", *arguments)
        assert done.exit_code == 1
        assert message in done.stderr


# -------------------------------------------------------------------------------------------------------- subfolders


def test_a_model_in_a_folder_of_a_repository_at_a_revision(hub, models, tmp_path):
    repository = tmp_path / "repository"
    shutil.copytree(models / "math", repository / "checkpoints" / "step-100")
    shutil.copytree(models / "code", repository / "adapters" / "[code]")
    shutil.copytree(models / "sharded", repository, dirs_exist_ok=True)
    older = hub.add_folder("nested/experts", repository)
    shutil.rmtree(repository / "adapters")
    hub.add_folder("nested/experts", repository)
    hub.add_folder("nested/bases", models / "base")
    hub.forget_traffic()
    experts = ["nested/experts/checkpoints/step-100", f"nested/experts/adapters/[code]@{older}"]
    plan = plan_merge(experts, base_model="nested/bases")
    assert [expert.name for expert in plan.experts] == ["step-100", "[code]"]
    assert plan.bytes_to_download == size_of_weights(models / "math", models / "code", models / "base")
    merge(experts, tmp_path / "merged", base_model="nested/bases")
    merge([models / "math", models / "code"], tmp_path / "local", base_model=models / "base")
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (
        tmp_path / "local" / "model.safetensors"
    ).read_bytes()
    assert not [name for name in hub.bytes_served if name.startswith("nested/experts/model")]

    content = yaml.safe_load((tmp_path / "merged" / "recipe.yaml").read_text())
    newer = hub.repos["nested/experts"].resolve("main")
    assert content["models"] == [
        {"id": "nested/experts/checkpoints/step-100", "revision": newer},
        {"id": "nested/experts/adapters/[code]", "revision": older},
    ]
    done = run("merge", tmp_path / "merged" / "recipe.yaml", "--output", tmp_path / "again")
    assert done.exit_code == 0, done.output
    assert contents(tmp_path / "again") == contents(tmp_path / "merged")

    with pytest.raises(MergeError, match=r"nested/experts on the Hub .*has no model in a folder adapters/\[code\]"):
        plan_merge([f"nested/experts/adapters/[code]@{hub.repos['nested/experts'].resolve('main')}", *experts[:1]])


def test_a_merged_model_in_a_folder_of_a_repository_loads_with_a_head(hub, models, tmp_path):
    merge([models / "topics"], tmp_path / "repository" / "merged", base_model=models / "bert")
    hub.add_folder("nested/merged", tmp_path / "repository")
    model = AutoMergedModel.from_pretrained("nested/merged/merged", head="topics")
    assert type(model).__name__ == "BertForSequenceClassification"


# --------------------------------------------------------------------------------------------- files without a header


def save_as_bin(models: Path, name: str, folder: Path) -> Path:
    shutil.copytree(models / name, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


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


# ------------------------------------------------------------------------------------------------------------- values


def test_what_depends_on_values_is_found_after_the_download(hub, tmp_path):
    """Two copies of a tied parameter are compared, and the factors of an adapter are looked at."""
    base = save_llama(tmp_path / "base", tie_word_embeddings=True)
    expert = save_fine_tune(base, tmp_path / "math", seed=1)
    adapter = save_adapter(base, tmp_path / "code", seed=2)

    def untie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    def spoil(tensors):
        next(tensor for name, tensor in tensors.items() if "lora_A" in name)[0, 0] = float("nan")

    for folder, edit, says in ((expert, untie, "differ in"), (adapter, spoil, "holds a NaN or an infinity")):
        file = next(folder.glob("*.safetensors"))
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        hub.add_folder(f"values/{folder.name}", folder)
        plan_merge([f"values/{folder.name}"], base_model=base)
        with pytest.raises(MergeError, match=says):
            merge([f"values/{folder.name}"], tmp_path / "merged", base_model=base)
        assert not (tmp_path / "merged").exists()


def test_the_index_of_a_sharded_model_must_agree_with_the_headers_on_the_hub(hub, models, publish, tmp_path):
    publish("index", "base")
    folder = shutil.copytree(models / "sharded", tmp_path / "sharded")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["extra.weight"] = "model-00001-of-00004.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.add_folder("index/sharded", folder)
    with pytest.raises(MergeError, match=r"lists the tensor extra\.weight, but its file does not hold it"):
        plan_merge(["index/sharded"], base_model="index/base")
