"""What a release publishes agrees with itself: versions, metadata, and the files of the source distribution."""

import re
from pathlib import Path

import pytest
import yaml

from neuromerge_hf import __version__

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def project(folder: str = ".") -> dict:
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_one_version_is_named_everywhere() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == __version__
    extension = project("examples/hf-neuromerge")
    assert extension["version"] == __version__
    assert extension["dependencies"] == [f"neuromerge-hf[fast]>={__version__}"]
    assert f"[Unreleased]: {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_licence_is_one_and_the_same() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["license"] == project()["license"]


def test_the_extension_of_hf_is_a_program_of_the_package() -> None:
    scripts = project()["scripts"]
    assert scripts["hf-neuromerge"] == scripts["neuromerge"]


def test_every_folder_of_the_package_is_listed() -> None:
    """setuptools installs only the packages that pyproject.toml names."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    found = {
        f"{prefix}{'.'.join(path.parent.relative_to(ROOT).parts)}"
        for folder, prefix in (
            ("neuromerge_hf", ""),
            ("callbacks", "neuromerge_hf."),
            ("model_cards", "neuromerge_hf."),
        )
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert set(listed) == found


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_name_targets_that_exist(workflow: Path) -> None:
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    commands = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    targets = re.findall(r"\bmake ([\w-]+)", "\n".join(commands))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target}:" in makefile for target in targets)


def test_the_supported_pythons_are_tested() -> None:
    named = [name.removeprefix("Programming Language :: Python :: ") for name in project()["classifiers"]]
    ci = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert ci["jobs"]["test"]["strategy"]["matrix"]["python"] == [
        name for name in named if re.fullmatch(r"3\.\d+", name)
    ]
