"""The files that make a model of transformers a `SentenceTransformer`: pooling, normalisation, and further layers.

``modules.json`` lists the modules. The first is the transformer at the top of the folder; each other one has a folder.
"""

from pathlib import Path, PurePosixPath

from neuromerge_hf.errors import MergeError
from neuromerge_hf.storage.documents import load_json
from neuromerge_hf.storage.files import companion_files

MODULES = "modules.json"

SETTINGS = ("config_sentence_transformers.json", "sentence_*_config.json")
"""The files of settings beside `MODULES`: prompts, the similarity function, the longest input."""


def module_files(folder: Path) -> list[Path]:
    """Return the files of a SentenceTransformer beside its transformer; an empty list if the model is none.

    Raises:
        MergeError: if ``modules.json`` is damaged, or names a folder outside the model's.
    """
    if not (folder / MODULES).is_file():
        return []
    inner = [path for name in module_folders(folder) for path in sorted((folder / name).rglob("*"))]
    files = [folder / MODULES, *companion_files(folder, SETTINGS), *inner]
    return [path for path in files if path.is_file() and not path.name.startswith(".")]


def module_folders(folder: Path) -> list[str]:
    """Return the folders of the modules of a SentenceTransformer, relative to its own; see `module_files`."""
    path = folder / MODULES
    if not path.is_file():
        return []
    return [module["path"] for module in load_modules(folder) if module["path"]]


def load_modules(folder: Path) -> list[dict[str, str]]:
    """Return the entries of ``modules.json``, each with a type and a path, which is empty for the top of the folder."""
    path = folder / MODULES
    modules = load_json(path, list)
    for module in modules:
        names = [module.get(name) for name in ("path", "type")] if isinstance(module, dict) else [None]
        if not all(isinstance(name, str) for name in names):
            raise MergeError(f"{path} is no list of modules with a path and a type. Download it again.")
        inside = PurePosixPath(module["path"])
        if inside.is_absolute() or ".." in inside.parts or "\\" in module["path"] or "\0" in module["path"]:
            raise MergeError(
                f"{path} names the folder {module['path']!r}, which is outside the model's. Do not use this model."
            )
        module["path"] = inside.as_posix() if inside.parts else ""
    return modules
