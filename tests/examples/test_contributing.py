"""The worked example of CONTRIBUTING.md runs, and its map is that of the package."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from neuromerge_hf.cli import app
from neuromerge_hf.config import METHODS
from tiny_models import save_fine_tune, save_llama

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
WEIGHTS = "model.safetensors"


@pytest.fixture
def median(tmp_path, monkeypatch):
    """The guide's method in a module of its own, and its line in the table."""
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
    (tmp_path / "median_of_the_guide.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    (line,) = re.findall(r'"median": "neuromerge_hf.methods.median:(\w+)"', GUIDE)
    monkeypatch.setitem(METHODS, "median", f"median_of_the_guide:{line}")


@pytest.mark.usefixtures("median")
def test_the_method_of_the_guide_merges_from_the_command_line(tmp_path):
    base = save_llama(tmp_path / "base")
    experts = [save_fine_tune(base, tmp_path / f"expert-{seed}", seed=seed) for seed in (1, 2, 3)]
    arguments = ["merge", *map(str, experts), "--base-model", str(base), "--output", str(tmp_path / "merged")]
    result = CliRunner().invoke(app, [*arguments, "--method", "median", "--device", "cpu", "--threads", "1"])
    assert result.exit_code == 0, result.output

    ours, theirs = load_file(base / WEIGHTS), [load_file(expert / WEIGHTS) for expert in experts]
    for name, merged in load_file(tmp_path / "merged" / WEIGHTS).items():
        change = torch.stack([weights[name] - ours[name] for weights in theirs]).median(0).values
        torch.testing.assert_close(merged, ours[name] + change)


def test_the_guide_names_every_folder_of_the_package():
    folders = {path.parent.name for path in (ROOT / "neuromerge_hf").glob("*/__init__.py")}
    assert folders <= set(re.findall(r"^\| `(\w+)/`", GUIDE, re.M))
