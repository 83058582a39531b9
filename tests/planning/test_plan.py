"""A plan says what a merge will read and write, and the merge keeps it."""

import re
import shutil

import pytest
import yaml
from safetensors.torch import load_file

from commands import run
from engine_runs import merged_weights
from neuromerge_hf import AutoMergedModel, MergeError, NeuroMergingConfig, merge, plan_merge
from neuromerge_hf.planning.costs import companion_bytes
from neuromerge_hf.storage.location import locate
from neuromerge_hf.text import readable_size
from plans import size_of_weights
from tiny_models import contents


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_a_merge_reads_and_writes_what_its_plan_says(models, tmp_path, density):
    config = NeuroMergingConfig(density=density, exclude=("lm_head*",))
    experts = [models / "math", models / "code"]
    plan = plan_merge(experts, base_model=models / "base", config=config, threads=1)
    read: list[int] = []
    merged_weights(plan, tmp_path / "weights", advance=read.append)
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
    assert plan.bytes_written == plan.disk_needed - plan.costs.bytes_beside == written
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


def test_the_command_prints_the_plan_and_the_merge_keeps_it(hub, models, publish, tmp_path):
    publish("printed", "base", "math")
    arguments = ["printed/math", models / "code", "--base-model", "printed/base", "--exclude", "lm_head.*"]
    done = run("plan", *arguments, "--output", tmp_path / "merged", "--threads", 2)
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "merged").exists()
    commit = hub.repos["printed/base"].resolve("main")[:8]
    download = size_of_weights(models / "base", models / "math")
    disk = 72_320 + companion_bytes(locate(models / "base"), locate(models / "base"), [])
    for line in (
        f"2 experts into printed/base@{commit}:",
        f"  code (LoRA r=4), {models / 'code'}: may change 14 parameters",
        "  merged: 20 parameters, 14 as whole matrices, 1 by neurons, 5 by single entries",
        "  unchanged (copied from the base): 1 parameter, lm_head.weight",
        f"  to download: {readable_size(download)}",
        f"  disk needed: {readable_size(download + disk)}",
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
        readable_size(download + disk), readable_size(disk)
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
        (["missing.yaml"], "missing.yaml cannot be read"),
        ([models / "code", "--density", "2"], "density must be a number"),
        (["x.yaml", "--density", "0.5"], "leave --density out"),
    ):
        done = run("plan", *arguments)
        assert done.exit_code == 1
        assert message in done.stderr


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
