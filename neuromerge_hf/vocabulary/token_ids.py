"""Conversion of the token ids in configurations to the merged model's vocabulary."""

import re
from typing import Any

from transformers import PretrainedConfig

from neuromerge_hf.vocabulary.vocabulary import Alignment, Vocabulary

TOKEN_KEY = re.compile(r"_token_(ids?|index)$|suppress_tokens$")
"""The keys of a config.json or generation_config.json that hold token ids."""


def renumbered(settings: dict[str, Any], vocabulary: Vocabulary, alignment: Alignment) -> dict[str, Any]:
    """The settings of a model with this vocabulary, with its token ids converted to the merged vocabulary."""

    def renumber(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return renumbered(value, vocabulary, alignment)
        return alignment.renumbered(value, vocabulary) if TOKEN_KEY.search(key) else value

    return {key: renumber(key, value) for key, value in settings.items()}


def with_ids_of(settings: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The settings of a model with the token ids of another model of the same class."""
    mixed = {key: value for key, value in settings.items() if not TOKEN_KEY.search(key)}
    mixed |= {key: value for key, value in other.items() if TOKEN_KEY.search(key)}
    for key, value in mixed.items():
        if isinstance(value, dict) and isinstance(other.get(key), dict):
            mixed[key] = with_ids_of(value, other[key])
    return mixed


def with_vocabulary_size(settings: dict[str, Any], config: PretrainedConfig, rows: int) -> dict[str, Any]:
    """The contents of a config.json, from which `config` was read, with another vocabulary size."""
    text = config.get_text_config()
    key = type(text).attribute_map.get("vocab_size", "vocab_size")
    section = next((name for name, value in vars(config).items() if value is text), None)
    if section is None:
        return {**settings, key: rows}
    outer = {"vocab_size": rows} if "vocab_size" in settings else {}
    return {**settings, **outer, section: {**settings.get(section, {}), key: rows}}


def renumber_config(config: PretrainedConfig, vocabulary: Vocabulary, alignment: Alignment) -> PretrainedConfig:
    """Convert the token ids of a configuration to the merged vocabulary, in place, and return it."""
    for part in (config, config.get_text_config()):
        for key, value in list(vars(part).items()):
            if TOKEN_KEY.search(key):
                setattr(part, key, alignment.renumbered(value, vocabulary))
    return config
