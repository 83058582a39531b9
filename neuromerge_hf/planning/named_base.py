"""Compares the base that an expert's metadata names with the base that it is merged into.

One model has many names: folders, copies, other spellings, mirrors in another format. A note says what the metadata
says, so it is given only where the names cannot mean the same model: the last part of an id on the Hub differs from all
names of the base, or a named folder on this machine holds other weights.
"""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard

from neuromerge_hf.planning.resolve import ResolvedExpert
from neuromerge_hf.storage.files import CHECKPOINT_FILES
from neuromerge_hf.storage.location import Location

if TYPE_CHECKING:
    from peft import PeftConfig

FORMAT = re.compile(r"-(unsloth|bnb|[48]-?bit|int[48]|gptq|awq|fp(16|32)|bf16|hf|safetensors|transformers)$")
"""A word at the end of a name that tells the format of the same weights."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""An id on the Hub with its owner. A name without an owner is often that of a folder on another machine."""

CACHED = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/")
"""The path of a model in the Hub's cache."""

COMPARED_BYTES = 1 << 20
"""How many bytes at the end of a weight file tell whether two files of one size are copies."""


def other_base_notes(expert: ResolvedExpert, base: Location) -> list[str]:
    """Return a note if an expert's metadata names other models as its base, and not the base that it is merged into."""
    others = other_bases(expert, base)
    if not others:
        return []
    names = " and ".join(map(_public, others))
    return [
        f"{expert.location.public_name} says that it was trained from {names}; it is merged into {base.public_name}. "
        "If these are different models, pass the one that it was trained from as base_model= (--base-model)."
    ]


def other_bases(expert: ResolvedExpert, base: Location) -> list[str]:
    """Return the models that an expert's metadata names as its base; empty if one of them may be the base."""
    known = {name: _is_other(name, base) for name in named_bases(expert.location, expert.adapter_config)}
    return [] if False in known.values() else [name for name, is_other in known.items() if is_other]


def named_bases(model: Location, adapter_config: "PeftConfig | None" = None) -> list[str]:
    """Return the bases that metadata name: of an adapter its configuration, else the card and the configuration."""
    if adapter_config:
        names: list[Any] = [adapter_config.base_model_name_or_path]
    else:
        names = [*_bases_of_card(model.folder), _settings(model.folder).get("_name_or_path")]
    own = _simplified(model.id)
    texts = [_without_cache(name) for name in names if isinstance(name, str) and name.strip()]
    return list(dict.fromkeys(name for name in texts if _simplified(name) != own))  # a model may name itself


def same_name(one: str, other: str) -> bool:
    """Return whether two names of models may mean the same one."""
    return _simplified(one) == _simplified(other)


def _is_other(name: str, base: Location) -> bool | None:
    """Whether a name means another model than the base; None if that cannot be known."""
    if _simplified(name) in _names_of(base):
        return False
    folder = Path(os.path.expanduser(name))  # unlike that of Path, it takes any name
    if folder.is_dir():
        ours = next((base.folder / file for file in CHECKPOINT_FILES if (base.folder / file).is_file()), None)
        return None if ours is None else not _is_copy(ours, folder / ours.name)
    return True if HUB_ID.fullmatch(name.partition("@")[0]) else None


def _names_of(base: Location) -> set[str]:
    """The simplified names of the base. A folder may also have the title of its card and the name in its settings."""
    names = [base.id, _without_cache(str(base.folder.resolve()))]
    if base.commit is None:
        names += [str(_settings(base.folder).get("_name_or_path") or ""), _title(base.folder)]
    return {simple for name in names if (simple := _simplified(name))}


def _simplified(name: str) -> str:
    """The last part of a name or path, without revision, case, punctuation and words that tell a format."""
    last = name.partition("@")[0].replace("\\", "/").rstrip("/").rpartition("/")[2].strip().lower()
    last = re.sub(r"[\s_]+", "-", last)
    while FORMAT.search(last):
        last = FORMAT.sub("", last)
    return re.sub(r"[^a-z0-9]", "", last)


def _without_cache(name: str) -> str:
    """The id of a model in the Hub's cache; any other name as it is."""
    cached = CACHED.search(name.replace("\\", "/") + "/")
    return f"{cached['owner']}/{cached['name']}" if cached else name


def _public(name: str) -> str:
    """A name that may be published: only the last part of a path."""
    return name if HUB_ID.fullmatch(name.partition("@")[0]) else re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _is_copy(one: Path, other: Path) -> bool:
    """Whether two weight files have the same size and the same end."""
    try:
        size = one.stat().st_size
        if other.stat().st_size != size:
            return False
        with one.open("rb") as ours, other.open("rb") as theirs:
            for file in (ours, theirs):
                file.seek(max(0, size - COMPARED_BYTES))
            return ours.read() == theirs.read()
    except OSError:
        return False


def _bases_of_card(folder: Path) -> list[str]:
    """The bases in the metadata of a model's card."""
    try:
        found = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict().get("base_model")
    except Exception:  # a card is free text, and a damaged one does not stop a merge
        return []
    return found if isinstance(found, list) else [found] if found else []


def _title(folder: Path) -> str:
    """The first heading of a model's card; empty if there is none."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
    heading = re.search(r"^# +(.+)$", text, re.M)
    return heading[1] if heading else ""


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}
