"""Checks of a model's JSON files before anything is made of them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neuromerge_hf.errors import MergeError, Problems
from neuromerge_hf.storage.documents import load_json, read_text, reading
from neuromerge_hf.storage.files import companion_files
from neuromerge_hf.storage.location import Location

COUNT = re.compile(r"^(num|n)_|(layer|expert|label|block|head|depth|stage)s?$")
"""The names of settings that count something. Configurations make lists of so many items, such as labels."""

LARGEST_COUNT = 2_000_000
"""The largest number of layers, labels, or the like."""

GENERATION = "generation_config.json"

LARGE = ("tokenizer.json", "vocab.json")
"""Files of megabytes, which take a tenth of a second to check."""

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
"""Characters that act on a terminal. Libraries show names from configurations in warnings of their own."""


def check_config_file(path: Path) -> None:
    """Raise a `MergeError` if a configuration has a number that no model has, or text that acts on a terminal.

    It cannot be read either if it is no JSON.
    """
    for name, value in _settings(load_json(path)):
        if isinstance(value, int) and value > LARGEST_COUNT and COUNT.search(name):
            raise MergeError(
                f"{path} says that {name} is {str(value)[:20]}, more than any model has (at most {LARGEST_COUNT:,}). "
                "Download it again."
            )
        if CONTROL.search(name) or (isinstance(value, str) and CONTROL.search(value)):
            raise MergeError(
                f"{path} has control characters in its setting {name}, which act on the terminal that shows them. "
                "Remove them, or do not use this model."
            )


def check_companions(location: Location, *, copied: bool) -> None:
    """Raise a `MergeError` if a file that is read or copied after the weights is no JSON object or no text.

    Args:
        location: the model.
        copied: whether the model gives the tokenizer, so that its vocabulary is checked, too.
    """
    problems = Problems()
    for path in companion_files(location.folder):
        with problems:
            if path.suffix == ".jinja":
                read_text(path)
            elif path.suffix == ".json" and (copied or path.name not in LARGE):
                load_json(path)
            if copied and path.name == GENERATION:
                from transformers import GenerationConfig  # takes seconds, and `resolve` does without it

                with reading(path):
                    GenerationConfig.from_pretrained(path.parent)
    problems.report()


def _settings(content: Any) -> Iterator[tuple[str, Any]]:
    """Every number and text of a configuration, with the name of its setting."""
    stack = [("", content)]
    while stack:
        name, value = stack.pop()
        if isinstance(value, dict):
            stack += [(str(key), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            stack += [(name, inner) for inner in value]
        else:
            yield name, value
