"""The files that the pages of the repository name, and those that they link to, are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/families.md",
    "docs/usage.md",
    "docs/methods.md",
    "docs/callbacks.md",
    "docs/measurements.md",
    "examples/README.md",
    "benchmarks/README.md",
    "benchmarks/quality/README.md",
)
NAME = r"`(\w[\w.-]*/[\w./-]*|[\w-][\w.-]*\.(?:py|md|txt|toml|jinja|png|gz))`"
"""A name of a file or a folder: it has a slash or the ending of a file of this repository."""

OTHERS = {
    "dist/",  # made by a release
    "neuromerge_hf/methods/median.py",  # the method that the guide adds
    "owner/name/folder",  # on the Hub
    "README.before-push.md",  # beside a merge
    "README.md",
    "merged/",  # made by the commands on the page
    "neuromerge/hashes",  # in the Hub's home folder
    "out/",
}
"""Names of what is not in the repository."""


def places(page: Path) -> list[Path]:
    """The folders that the names on a page may start from."""
    return [ROOT, ROOT / "neuromerge_hf", page.parent, page.parent / "results"]


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_a_page_names_are_there(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    names = set(re.findall(NAME, text)) - OTHERS
    assert not [name for name in names if not any((place / name).exists() for place in places(ROOT / page))]


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_a_page_links_to_are_there(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8"))
    assert not [link for link in links if "://" not in link and not (ROOT / page).parent.joinpath(link).exists()]


def test_the_stages_that_the_readme_shows_are_folders_of_the_package() -> None:
    (chain,) = re.findall(r"^    ids, paths ──> (.*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    *stages, last = chain.split(" ──> ")
    assert last == "from_pretrained"
    assert all((ROOT / "neuromerge_hf" / stage / "__init__.py").is_file() for stage in stages)
