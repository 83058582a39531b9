"""Only `storage.writing` writes files that a user may own. All other files are written into temporary folders."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

FILES = [
    path for folder in ("neuromerge_hf", "callbacks", "model_cards") for path in sorted((ROOT / folder).rglob("*.py"))
]

WRITERS = {
    "write_text": "text into a file",
    "write_bytes": "bytes into a file",
    "to_json_file": "a configuration of transformers",
    "savefig": "a picture of matplotlib",
    "save_file": "safetensors",
    "save_pretrained": "a model or tokenizer",
    "dump": "JSON or YAML into an open file",
    "copyfile": "a copy",
    "copy": "a copy",
    "copy2": "a copy",
    "copytree": "copies",
    "move": "a file or folder to another place",
    "rename": "over a file",
    "replace": "over a file",
    "truncate": "the size of a file",
    "symlink_to": "a link",
    "link": "a link",
    "touch": "an empty file",
    "mkstemp": "a temporary file that nobody finds after a kill",
    "mkdtemp": "a temporary folder that nobody finds after a kill",
    "TemporaryDirectory": "a temporary folder that nobody finds after a kill",
    "NamedTemporaryFile": "a temporary file that nobody finds after a kill",
}
"""Names of functions that write, each with what it writes."""

OTHERS = ("dataclasses.replace", "copy.copy", "replace")
"""Functions of the same names that write nothing, as the package calls them."""

IN_TEMPORARY_FOLDERS = {
    "assembly/companions.py": {"copyfile", "save_pretrained", "write_text"},
    "callbacks/common/trained_model.py": {"copytree", "open", "save_pretrained", "truncate"},
    "callbacks/accelerate_training.py": {"save_pretrained"},
    "callbacks/lightning_trainer.py": {"save_pretrained"},
    "engine/writer.py": {"open", "truncate", "write_text"},
    "sources/peft/effective.py": {"copyfile"},
    "loading/heads.py": {"symlink_to", "write_text"},
    "sources/computed.py": {"open", "truncate"},
    "sources/heads.py": {"save_file", "to_json_file"},
    "storage/memory.py": {"rename", "save_pretrained"},
    "storage/remote.py": {"truncate"},
    "tuning/compare.py": {"copytree"},
    "tuning/components.py": {"save_file"},
}
"""The writers into folders that `folder.directory` yields. A reader of a change to this table checks that they are."""

THE_HELPERS = {
    "folder/directory.py": {"rename"},
    "storage/temporary.py": {"open", "rename"},
    "storage/writing.py": {"replace"},
}

IN_THE_USERS_WAY = {
    "folder/merge_cache.py": {"rename"},
    "cli/failures.py": {"open"},
    "loading/merged_model.py": {"save_pretrained"},
}
"""`save_pretrained` adds to a folder with files in it, as transformers does; the command line opens the null device;
merges that are deleted are renamed first."""


def writers(path: Path) -> Iterator[str]:
    """The functions that a file calls to write."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name == "save" and any(each.arg == "format" for each in node.keywords):
            name = "savefig"  # Pillow's method
        if name == "open":
            texts = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
            flags = [each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)]
            modes = [text for text in texts if isinstance(text, str) and set(text) <= set("rwaxbt+")]
            if any(set(mode) & set("wax+") for mode in modes) or {"O_RDWR", "O_WRONLY", "O_CREAT"} & set(flags):
                yield name
        elif name in WRITERS and ast.unparse(node.func) not in OTHERS and not _is_in_memory(name, node):
            yield name


def _is_in_memory(name: str, call: ast.Call) -> bool:
    if name == "replace":  # of a text, or of fields
        return ast.unparse(call.func) != "os.replace" and (len(call.args) == 2 or call.keywords != [])
    return not call.args or any(isinstance(each, ast.Name) and each.id == "buffer" for each in call.args)


def test_files_of_users_are_written_by_one_helper():
    found = {path.relative_to(ROOT).as_posix().removeprefix("neuromerge_hf/"): set(writers(path)) for path in FILES}
    assert {name: calls for name, calls in found.items() if calls} == {
        **IN_TEMPORARY_FOLDERS,
        **THE_HELPERS,
        **IN_THE_USERS_WAY,
    }


def test_a_writer_would_be_found(tmp_path):
    source = tmp_path / "source.py"
    source.write_text(
        'path.open("w"); open(path, mode="ab"); open(path); os.open(path, os.O_CREAT); path.rename(other)'
    )
    assert list(writers(source)) == ["open", "open", "open", "rename"]
