"""What users type first on the command line: it works, or is refused before torch is imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from merge_files import mergekit, write
from neuromerge_hf import (
    NeuroMergingConfig,
    plan_merge,
    tune_lambdas,
)
from neuromerge_hf.folder.report import load_report
from tiny_models import save_mixed

CPU = {"device": "cpu"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixed(tmp_path_factory.mktemp("models"))


def command(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "neuromerge_hf", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, **options)


def test_the_module_is_the_command_line():
    from neuromerge_hf import __version__

    assert command("--version").stdout == f"neuromerge {__version__}\n"
    assert command("-h").stdout == command("--help").stdout
    assert "neuromerge merge [OPTIONS]" in command("merge", "-h").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "a", "-o", "{full}"], "exists and is not empty"),
        (["merge", "a", "-o", "new", "--method", "tiess"], "'tiess' is not one of"),
        (["compare", "a", "--eval", "x:y", "--method", "tiess"], "'tiess' is not one of"),
        (["merge", "-o", "new"], "Name the models to merge"),
        (["merge", "a", "-o", "{full}/file"], "is a file"),
        (["merge", "a", "-o", "new", "--config", "b.yaml"], "and not both"),
        (["merge", "a", "-o", "new", "--densty", "1"], "No such option"),
    ],
)
def test_a_mistake_on_the_command_line_is_found_before_torch_is_imported(tmp_path, arguments, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    words = [each.format(full=tmp_path / "full") for each in arguments]
    code = f"import sys\nsys.argv = ['neuromerge', *{words!r}]\nfrom neuromerge_hf.cli import app\n"
    code += "try:\n    app()\nfinally:\n    assert 'torch' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode in (1, 2), found.stderr
    assert "AssertionError" not in found.stderr
    assert message in " ".join(found.stderr.replace("│", " ").split())


def test_the_command_line_takes_a_file_and_a_method_in_any_case(models, tmp_path):
    path = write(tmp_path / "kit.yml", mergekit(models, "ties"))
    done = command("merge", "--config", path, "-o", tmp_path / "merged", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert load_report(tmp_path / "merged").method == "ties"
    experts = [models / "math", models / "code"]
    planned = command("plan", *experts, "--base-model", models / "base", "--method", "TIES", "--weights", "1,2")
    assert planned.returncode == 0, planned.stderr


def test_neuromerging_is_tuned_by_a_dictionary(models):
    found = tune_lambdas(
        [models / "math", models / "code"],
        lambda model: -float(model.lm_head.weight.norm()),
        base_model=models / "base",
        config={"density": 0.5},
    )
    assert found.config.density == 0.5
    assert type(found.config) is NeuroMergingConfig


def test_plan_and_comparison_are_printed_as_json(models, tmp_path):
    experts = [models / "math", models / "code"]
    found = json.loads(command("plan", *experts, "--base-model", models / "base", "--json").stdout)
    assert [expert["name"] for expert in found["experts"]] == ["math", "code"]
    assert found["costs"]["bytes_written"] == plan_merge(experts, base_model=models / "base").bytes_written
    (tmp_path / "score.py").write_text("def size(model):\n    return 1.0\n")
    words = ["compare", *experts, "--base-model", models / "base", "--eval", "score:size", "--method", "ties", "--json"]
    compared = json.loads(command(*words, cwd=tmp_path).stdout)
    assert compared["winner"] is None
    assert compared["models"][-1]["name"] == "ties"
