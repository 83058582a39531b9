"""The files beside the merged weights: configuration, tokenizer, generation settings, processor, code, licences."""

import json
import shutil
import unicodedata
from itertools import chain, count
from pathlib import Path
from typing import Any

from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.storage.documents import load_json
from neuromerge_hf.storage.files import companion_files, licence_files, tokenizer_files
from neuromerge_hf.storage.sentence_modules import module_files
from neuromerge_hf.vocabulary.token_ids import renumbered, with_ids_of, with_vocabulary_size
from neuromerge_hf.vocabulary.tokenizer import extended_tokenizer

GENERATION = "generation_config.json"

OF_LOADING = ("_name_or_path", "attn_implementation", "_attn_implementation", "_attn_implementation_internal")
"""Settings that transformers notes when it loads a model, and does not save. Some files hold them all the same."""

LOCAL_PATHS = ("name_or_path", "special_tokens_map_file", "tokenizer_file")
"""Settings of a tokenizer that older transformers wrote and nothing reads: paths on the machine that saved it."""


def write_companions(plan: MergePlan, folder: Path, trust_remote_code: bool) -> None:
    """Write the base's companions, the chosen tokenizer, the modules of a SentenceTransformer, and all licences."""
    base, tokenizer = plan.base.location.folder, plan.tokenizer
    _write(folder / "config.json", _config(plan))
    for path in companion_files(base):
        if trust_remote_code or path.suffix != ".py":
            shutil.copyfile(path, folder / path.name)
    if plan.modules:
        for path in module_files(plan.modules.folder):
            if trust_remote_code or path.suffix != ".py":
                copy = folder / path.relative_to(plan.modules.folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
    if tokenizer.additions or tokenizer.is_expert:
        for path in tokenizer_files(base):
            (folder / path.name).unlink()
    if tokenizer.additions:
        extended_tokenizer(
            plan.base.location, plan.base.config, tokenizer.additions, trust_remote_code
        ).save_pretrained(folder)
        _rewrite_tokenizer_config(folder, without=("is_local", "local_files_only"))  # how it was loaded
    if tokenizer.is_expert:
        chosen = tokenizer.location.folder
        own = chosen / GENERATION
        for path in [*tokenizer_files(chosen), *([own] if own.is_file() else [])]:
            shutil.copyfile(path, folder / path.name)
        if tokenizer.alignment and not own.is_file() and (base / GENERATION).is_file():
            settings = renumbered(_read(base / GENERATION), tokenizer.alignment.base, tokenizer.alignment)
            _write(folder / GENERATION, settings)
    _rewrite_tokenizer_config(folder, without=LOCAL_PATHS)
    if tokenizer.chat_template is not None:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template)
        _rewrite_tokenizer_config(folder, without=("chat_template",))
    taken = {_compared(path.name) for path in folder.iterdir()}
    for name, location in zip(plan.model_names, plan.locations, strict=True):
        for path in licence_files(location.folder):
            numbers = chain([""], (f"-{number}" for number in count(2)))
            names = (f"{path.stem}-{name}{number}{path.suffix}" for number in numbers)
            unused = next(each for each in names if _compared(each) not in taken)
            taken.add(_compared(unused))
            shutil.copyfile(path, folder / unused)


def _compared(name: str) -> str:
    """The form in which file systems that ignore case, or the form of accents, compare names."""
    return unicodedata.normalize("NFC", name.casefold())


def _config(plan: MergePlan) -> dict[str, Any]:
    config = _without_loading(_read(plan.base.location.folder / "config.json"))
    if plan.base.copies:
        config["tie_word_embeddings"] = False
    if plan.base.config.architectures:  # found by the names of the tensors, if config.json names none
        config["architectures"] = plan.base.config.architectures
    if plan.architecture:
        config["architectures"] = [plan.architecture]
    if plan.dtype != "auto":
        config.pop("torch_dtype", None)
        config["dtype"] = plan.dtype
    if plan.head:
        config |= plan.head.labels
    chosen = plan.tokenizer.location.folder / "config.json"
    if plan.tokenizer.is_expert and chosen.is_file():
        config = with_ids_of(config, _read(chosen))
    elif plan.tokenizer.alignment:
        config = renumbered(config, plan.tokenizer.alignment.base, plan.tokenizer.alignment)
    if plan.tokenizer.alignment:
        config = with_vocabulary_size(config, plan.base.config, plan.tokenizer.alignment.target.rows)
    return config


def _without_loading(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration, and all nested ones, without what says how or from where it was loaded."""
    return {
        key: _without_loading(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in OF_LOADING
    }


def _rewrite_tokenizer_config(folder: Path, without: tuple[str, ...]) -> None:
    path = folder / "tokenizer_config.json"
    settings = _read(path) if path.is_file() else {}
    if settings.keys() & set(without):
        _write(path, {key: value for key, value in settings.items() if key not in without})


def _read(path: Path) -> dict[str, Any]:
    settings: dict[str, Any] = load_json(path)
    return settings


def _write(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
