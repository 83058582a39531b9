"""The command line says what it did, or one sentence on what is wrong; importing the package costs nothing."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

import neuromerge_hf
import processes
from commands import run
from neuromerge_hf import NeuroIsoConfig, NeuroMergingConfig, merge
from process_work import import_and_merge
from tiny_models import contents, save_llamas

NEUROMERGE = Path(sys.executable).with_name("neuromerge")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_llamas(tmp_path_factory.mktemp("models"))


def test_the_command_merges_and_reports(models, tmp_path):
    done = run(
        "merge", models / "math", models / "code", "--base-model", models / "base", "--output", tmp_path / "merged"
    )
    assert done.exit_code == 0, done.output
    merge([models / "math", models / "code"], tmp_path / "same", base_model=models / "base")
    assert contents(tmp_path / "merged") == contents(tmp_path / "same")
    for part in (
        "Merged 2 experts into base in ",
        "  expert  kind       change  kept  sigma\n  math    full ",
        "\n  code    LoRA r=4 ",
        "density 0.2",
        "lambda_parallel 0",
        "lambda_orthogonal 2.",
        "21 parameters merged, 0 unchanged (copied from the base)",
        "The experts' changes are nearly independent",
        f"neuromerge push {tmp_path / 'merged'} OWNER/NAME",
        "72.3 kB written",
        f"The merged model is in {tmp_path / 'merged'}",
    ):
        assert part in done.stdout
    assert re.search(r"in \d+\.\d s: .* read", done.stdout)


def test_the_report_counts_one_expert_as_one(models, tmp_path):
    assert "Merged 1 expert into" in run("merge", models / "code", "--output", tmp_path / "merged").stdout


def test_the_base_is_found_from_an_adapter(models, tmp_path):
    done = run("merge", models / "math", models / "code", "--output", tmp_path / "merged")
    assert done.exit_code == 0, done.output


def test_options_reach_the_merge(models, tmp_path):
    options = "--density 0.5 --lambda-parallel 0.25 --lambda-orthogonal 1.5 --exclude *norm* --exclude lm_head.*"
    options += " --dtype bfloat16 --max-shard-size 10KB --device cpu --threads 1"
    done = run("merge", models / "code", "--output", tmp_path / "merged", *options.split())
    assert done.exit_code == 0, done.output
    recipe = yaml.safe_load((tmp_path / "merged" / "recipe.yaml").read_text())
    config = NeuroMergingConfig(
        density=0.5, lambda_parallel=0.25, lambda_orthogonal=1.5, exclude=("*norm*", "lm_head.*")
    )
    assert recipe["config"] == config.to_dict()
    assert (recipe["dtype"], recipe["max_shard_size"]) == ("bfloat16", "10KB")
    shards = sorted((tmp_path / "merged").glob("model-*.safetensors"))
    assert len(shards) > 2
    with safe_open(shards[0], "pt") as file:
        names = file.keys()
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    assert "density 0.5" in done.stdout
    assert "lambda_orthogonal 1.5" in done.stdout


def test_a_size_may_be_a_number_of_bytes_and_a_device_an_index(models, tmp_path):
    done = run("merge", models / "code", "--output", tmp_path / "merged", "--max-shard-size", "20000")
    assert done.exit_code == 0, done.output
    assert yaml.safe_load((tmp_path / "merged" / "recipe.yaml").read_text())["max_shard_size"] == 20_000
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 2
    done = run("plan", models / "code", "--device", "9")
    assert "device=9 cannot be used here" in done.stderr


def test_the_defaults_are_those_of_the_config(models, tmp_path):
    run("merge", models / "code", "--output", tmp_path / "merged")
    recipe = yaml.safe_load((tmp_path / "merged" / "recipe.yaml").read_text())
    assert (recipe["method"], recipe["config"]) == ("neuro_iso", NeuroIsoConfig().to_dict())
    assert (recipe["dtype"], recipe["max_shard_size"]) == ("auto", "5GB")
    run("merge", models / "code", "--lambda-parallel", "0.3", "--output", tmp_path / "named")
    recipe = yaml.safe_load((tmp_path / "named" / "recipe.yaml").read_text())
    assert (recipe["method"], recipe["config"]) == ("neuromerging", NeuroMergingConfig(lambda_parallel=0.3).to_dict())


def test_a_recipe_makes_the_model_again(models, tmp_path):
    run("merge", models / "math", models / "code", "--density", "0.7", "--output", tmp_path / "first")
    done = run("merge", tmp_path / "first" / "recipe.yaml", "--output", tmp_path / "second")
    assert done.exit_code == 0, done.output
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_a_recipe_with_other_settings_is_refused(models, tmp_path):
    run("merge", models / "code", "--output", tmp_path / "first")
    done = run("merge", tmp_path / "first" / "recipe.yaml", "--density", "0.7", "--output", tmp_path / "second")
    assert done.exit_code != 0
    assert "--density" in done.stderr
    assert "recipe" in done.stderr
    assert not (tmp_path / "second").exists()


def test_overwrite_replaces(models, tmp_path):
    arguments = ["merge", models / "code", "--output", tmp_path / "merged"]
    assert run(*arguments, "--method", "average").exit_code == 0
    old = contents(tmp_path / "merged")
    refused = run(*arguments)
    assert refused.exit_code == 1
    assert "--overwrite" in refused.stderr
    assert contents(tmp_path / "merged") == old
    assert run(*arguments, "--overwrite").exit_code == 0
    assert contents(tmp_path / "merged") != old


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["./missing"], "Error: ./missing is not a folder on this machine"),
        (["missing.yaml"], "Error: missing.yaml cannot be read: No such file"),
        (["{math}"], "Error: No base model"),
        (["{code}", "--density", "2"], "Error: density must be a number with 0 < density <= 1, not 2.0."),
        (
            ["{code}", "--lambda-orthogonal", "large"],
            'Error: lambda_orthogonal must be "auto", "length" or a finite number',
        ),
        (["{code}", "--dtype", "int8"], "Error: dtype must be"),
        (["./a", "./b"], "Error: 2 problems were found:\n  * ./a"),
    ],
)
def test_what_is_wrong_is_said_on_stderr(models, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    done = run(
        "merge", *(option.format(math=models / "math", code=models / "code") for option in options), "--output", "x"
    )
    assert done.exit_code == 1
    assert done.stderr.startswith(message)
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_one_line(tmp_path):
    done = run("merge", "./missing", "--output", tmp_path / "merged")
    assert done.stderr.strip() == "Error: ./missing is not a folder on this machine, and no id of a model on the Hub."


def test_a_command_without_models_or_output_shows_how_it_is_used(models):
    for arguments in (["merge"], ["merge", models / "code"], ["merge", models / "code", "--outptu", "x"]):
        done = run(*arguments)
        assert done.exit_code == 2
        assert "Usage" in done.stderr


def test_help_names_every_option():
    done = run("merge", "--help")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    for option in (
        "base-model",
        "density",
        "lambda-parallel",
        "lambda-orthogonal",
        "exclude",
        "dtype",
        "max-shard-size",
    ):
        assert f"--{option[:14]}" in plain
    assert run().exit_code == 2
    assert "merge" in run("--help").stdout


def test_the_installed_command_works(models, tmp_path):
    command = [NEUROMERGE, "merge", models / "math", models / "code", "--output", tmp_path / "merged"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "The merged model is in" in done.stdout
    assert "Merging: 100%" in done.stderr
    assert "Warning" not in done.stderr


IMPORTS = """
import sys
import neuromerge_hf
from neuromerge_hf.cli import app
dir(neuromerge_hf)
heavy = {"torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub", "numpy", "lightning"}
print(sorted(heavy & set(sys.modules)))
neuromerge_hf.merge
print(sorted({"peft", "transformers", "matplotlib"} & set(sys.modules)))
neuromerge_hf.NeuroMergeCallback
print(sorted({"lightning", "pytorch_lightning", "trl"} & set(sys.modules)))
"""


def test_importing_loads_no_framework_no_model_library_before_it_is_needed_and_no_trainer_of_others():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]"] * 3


def test_importing_and_merging_change_no_global_setting(models, tmp_path):
    printed = tmp_path / "output.txt"
    process = processes.start(import_and_merge, models / "code", tmp_path / "merged", output=printed)
    assert processes.finish(process) == 0, printed.read_text()
    assert "changed by importing: []" in printed.read_text()
    assert "changed by merging: []" in printed.read_text()
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_the_public_names_are_there():
    names = {"AutoMergedModel", "MergeError", "MergePlan", "MergeReport", "NeuroMergingConfig"}
    names |= {"AverageConfig", "TaskArithmeticConfig", "TIESConfig", "DARETIESConfig", "PCBConfig"}
    names |= {"IsoCConfig", "TSVConfig", "NeuroIsoConfig"}
    names |= {"merge", "merge_recipe", "plan_merge", "add_results", "NeuroMergeCallback"}
    names |= {"tune_lambdas", "Tuning", "TuningGrid", "compare_methods", "Comparison"}
    names |= {"inspect_models", "Inspection"}
    assert set(neuromerge_hf.__all__) == names
    assert set(neuromerge_hf.__all__) <= set(dir(neuromerge_hf))
    for name in neuromerge_hf.__all__:
        assert getattr(neuromerge_hf, name).__name__ == name
        assert getattr(neuromerge_hf, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'unmerge'"):
        neuromerge_hf.unmerge  # noqa: B018
