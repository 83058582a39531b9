"""The house has floors: each folder imports only what is below it, and no two files import each other in a circle."""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import neuromerge_hf

ROOT = Path(__file__).parents[2]

ROWS = (
    ("__main__",),
    ("cli", "callbacks"),
    ("tuning",),
    ("loading",),
    ("hub",),
    ("api", "inspection"),
    ("assembly",),
    ("planning",),
    ("methods",),
    ("engine",),
    ("vocabulary",),
    ("sources",),
    ("skeleton",),
    ("model_cards",),
    ("folder",),
    ("storage",),
    (
        "spec",
        "config",
        "kernel",
        "compiled",
        "spectrum",
        "options",
        "typed",
        "text",
        "access",
        "live",
        "errors",
        "version",
    ),
)
"""The folders and files of the package, from the top down."""

FLOOR = {name: number for number, row in enumerate(ROWS) for name in row}


def modules() -> dict[str, Path]:
    """The files of the package by the names of their modules, as they are installed."""
    found = {}
    for folder, prefix in (
        ("neuromerge_hf", ()),
        ("callbacks", ("neuromerge_hf",)),
        ("model_cards", ("neuromerge_hf",)),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [*prefix, *path.relative_to(ROOT).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, also inside of functions and for type checkers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("neuromerge_hf"))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("neuromerge_hf"):
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield inner if inner in MODULES else node.module


INSIDE = {name: path for name, path in MODULES.items() if name != "neuromerge_hf"}
GRAPH = {name: set(imports(path)) - {name} for name, path in INSIDE.items()}


def row_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", GRAPH)
def test_a_file_imports_only_what_is_on_its_floor_or_below(module):
    assert row_of(module) in FLOOR
    for imported in GRAPH[module]:
        assert imported != "neuromerge_hf", "the package's own table of names is for its users"
        assert FLOOR[row_of(imported)] >= FLOOR[row_of(module)], f"{module} imports {imported}, which is above it"
        if FLOOR[row_of(imported)] == FLOOR[row_of(module)] < len(ROWS) - 1:
            assert row_of(imported) == row_of(module), f"{module} imports {imported}, which is beside it"


def test_no_files_import_each_other_in_a_circle():
    assert len(list(graphlib.TopologicalSorter(GRAPH).static_order())) == len(GRAPH) > 100


def test_a_circle_would_be_found():
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter({**GRAPH, "neuromerge_hf.errors": {"neuromerge_hf.api"}}).static_order())


def test_the_kernel_knows_nothing_but_torch():
    assert GRAPH["neuromerge_hf.kernel"] == set()


def test_no_other_stage_imports_a_method_by_name():
    """A method is one file. Tuning and its callback are NeuroMerging's: no other method has its lambdas."""
    askers = {name for name, found in GRAPH.items() if any(each.startswith("neuromerge_hf.methods.") for each in found)}
    assert {row_of(name) for name in askers} == {"methods", "tuning", "callbacks"}


def test_every_folder_is_installed():
    folders = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    installed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S)
    assert set(re.findall(r'"([\w.]+)"', installed[1])) == folders
    files = {name.rpartition(".")[0] for name, path in INSIDE.items() if path.name != "__init__.py"}
    assert files <= folders, "a folder without __init__.py is not installed"


def test_type_checkers_see_the_public_names_and_no_others():
    tree = ast.parse(MODULES["neuromerge_hf"].read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {name.asname: node.module for node in block.body for name in node.names}
    assert seen == {name: f"neuromerge_hf.{module}" for name, module in neuromerge_hf.PUBLIC.items()}
