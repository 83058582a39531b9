"""Chooses the model that gives the modules which make the merged model a `SentenceTransformer`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neuromerge_hf.storage.documents import load_json
from neuromerge_hf.storage.hashing import file_hash
from neuromerge_hf.storage.location import Location
from neuromerge_hf.storage.sentence_modules import load_modules, module_files

MODE = re.compile(r"^(?:pooling_mode_)?(.*?)(?:_tokens?)?$")
"""A pooling mode. Until version 5 it was a setting such as ``pooling_mode_mean_tokens: true``."""


def choose_modules(base: Location, experts: Sequence[Location]) -> tuple[Location | None, list[str]]:
    """Return the model whose modules go along with the merged weights, and notes on those of the others.

    It is the base, or the first expert that has some: an encoder becomes a SentenceTransformer by its training.

    Args:
        base: the base, whose small files are on this machine.
        experts: the experts.

    Returns:
        None if no model is a SentenceTransformer. A note for each model whose modules differ from those that are taken:
        modules have no base to be merged into.
    """
    givers = [model for model in (base, *experts) if module_files(model.folder)]
    if not givers:
        return None, []
    chosen, *others = givers
    taken = _meaning(chosen.folder)
    notes = [
        f"{other.public_name} has other sentence-transformers modules than {chosen.public_name}, whose modules the "
        f"merged model has ({', '.join(taken)}). If its embeddings depend on its own modules, they are not kept."
        for other in others
        if _meaning(other.folder) != taken
    ]
    return chosen, notes


def _meaning(folder: Path) -> dict[str, Any]:
    """What each module after the transformer does, by its class: its settings and the hashes of its weights."""
    return {
        f"{module['type'].rpartition('.')[2]} in {module['path']}": _content(folder / module["path"])
        for module in load_modules(folder)
        if module["path"]
    }


def _content(folder: Path) -> dict[str, Any]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    found = {path.name: _settings(path) if path.suffix == ".json" else file_hash(path) for path in files}
    return {name: content for name, content in found.items() if content}


def _settings(path: Path) -> Any:
    """The settings of a module; only the modes of a pooling module, which versions of the library write differently."""
    settings = load_json(path)
    modes = settings.get(
        "pooling_mode", [name for name, value in settings.items() if name.startswith("pooling_mode_") and value]
    )
    if not any(name.startswith("pooling_mode") for name in settings):
        return settings
    return sorted(MODE.sub(r"\1", name) for name in ([modes] if isinstance(modes, str) else modes))
