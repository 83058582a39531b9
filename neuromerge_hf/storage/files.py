"""The names of the files in a model's folder, and the lookup of its weight files."""

import json
import os
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from neuromerge_hf.errors import MergeError

CHECKPOINT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The weight files and indexes that transformers looks for, in its order."""

SHARDS = ("model-?????-of-?????.safetensors", "pytorch_model-?????-of-?????.bin")
"""The names of the files of a model that is saved in several."""

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""The weight files that PEFT looks for, in its order."""

CARD = "README.md"

CONFIGS = ("config.json", "adapter_config.json", "generation_config.json")
"""The configurations of a model, an adapter, and of generation."""

HEADS = "heads"
"""The subfolder of a merged model that holds the experts' heads, in one folder for each expert."""

HEAD_WEIGHTS = "head.safetensors"
"""The file of a head's tensors, which have their names in the expert's task model."""

TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "normalizer.json",
    "*.model",
    "*.spm",
    "*.codes",
    "*.tiktoken",
    "chat_template*",
)

COMPANIONS = (*TOKENIZER_FILES, "generation_config.json", "*processor_config.json", "*.py")
"""The files that a merged model takes from its base besides weights: tokenizer, processor, generation, code."""

LICENCE_FILES = ("LICEN[CS]E*", "Licen[cs]e*", "licen[cs]e*", "NOTICE*", "Notice*", "USE_POLICY*")
"""Licences, notices and usage policies. They must accompany every model that is made from theirs."""

LICENCE_SUFFIXES = ("", ".txt", ".md", ".rst", ".html", ".pdf")
"""The suffixes of licence texts. Code and weight files can have a licence's name, too."""


def companion_files(folder: Path, patterns: tuple[str, ...] = COMPANIONS) -> list[Path]:
    """The files in a model's folder whose name matches one of the patterns, sorted by path."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in patterns)
    ]


def licence_files(folder: Path) -> list[Path]:
    """The licence, notice and usage policy files in a model's folder."""
    return [path for path in companion_files(folder, LICENCE_FILES) if path.suffix.lower() in LICENCE_SUFFIXES]


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer files in a model's folder; empty if there is only a chat template."""
    files = companion_files(folder, TOKENIZER_FILES)
    return files if any(not path.name.startswith("chat_template") for path in files) else []


def find_weights(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The path of the first of `names` that exists in the folder; None if none does."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def weight_files(main: Path, is_file: Callable[[Path], bool] = Path.is_file) -> list[Path]:
    """The files that hold the tensors: `main` itself, or the files that it lists if it is an index.

    Args:
        main: a weight file or an index, see `find_weights`.
        is_file: tells whether a file exists, on this machine or on the Hub.

    Raises:
        MergeError: if the index is damaged, names a file outside its folder, or a file is missing.
    """
    if not main.name.endswith(".index.json"):
        return [main]
    files = [main.parent / name for name in sorted(set(weight_map(main).values()))]
    for file in files:
        if not is_file(file):
            raise MergeError(f"{file} is missing, but {main.name} lists it. Download the model again.")
    return files


def weight_map(main: Path) -> dict[str, str]:
    """The name of the file that holds each tensor of a sharded checkpoint, from its index; empty for a single file.

    Raises:
        MergeError: if the index is damaged, or names a file outside its folder.
    """
    if not main.name.endswith(".index.json"):
        return {}
    try:
        names = {name: os.fspath(file) for name, file in json.loads(main.read_text())["weight_map"].items()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, OSError) as error:
        raise MergeError(
            f"{main} is not a valid index of a sharded checkpoint ({error!r}). Download it again."
        ) from error
    for name in sorted(set(names.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise MergeError(
                f"{main} names the file {name!r}, which is outside its folder. "
                "Such an index could read any file of this machine; do not use this checkpoint."
            )
    return names
