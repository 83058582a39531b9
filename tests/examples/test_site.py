"""The documentation site builds without a warning, every page is in its menu, and its list of public names is whole."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import neuromerge_hf

ROOT = Path(__file__).parents[2]


def pages(entries: list) -> list[str]:
    found = []
    for entry in entries:
        (value,) = entry.values()
        found += pages(value) if isinstance(value, list) else [value]
    return found


def menu() -> list[str]:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")  # not all of it is plain YAML
    return pages(yaml.safe_load(text[text.index("nav:\n") : text.index("theme:\n")])["nav"])


def test_every_page_is_in_the_menu() -> None:
    paths = [path for path in (ROOT / "docs").glob("*") if path.suffix in (".md", ".ipynb")]
    assert {path.relative_to(ROOT).as_posix() for path in paths} <= set(menu())
    assert all((ROOT / page).is_file() for page in menu())


def test_every_public_name_is_in_the_api() -> None:
    named = re.findall(r"^::: neuromerge_hf\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert set(named) == set(neuromerge_hf.__all__)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    program = Path(sys.executable).parent
    done = subprocess.run(
        ["make", "-o", str(Path(".venv") / ".docs"), "docs", f"BIN={program}", f"SITE={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "index.html").is_file()
    assert "neuromerge_hf.inspect_models" in (tmp_path / "site" / "docs" / "api.html").read_text()
