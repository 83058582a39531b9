"""YAML files that describe a merge of the models of `tiny_models.save_mixed`."""

from pathlib import Path
from typing import Any

import yaml


def write(path: Path, content: object) -> Path:
    """Write YAML, and return the path of the file."""
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def mergekit(models: Path, method: str, *parameters: dict[str, Any], **content: object) -> dict[str, Any]:
    """The content of mergekit's file for a merge of "math" and "code", with the parameters of each."""
    entries = [
        {"model": str(models / name), "parameters": each}
        for name, each in zip(("math", "code"), parameters or ({}, {}), strict=True)
    ]
    return {"merge_method": method, "base_model": str(models / "base"), "models": entries, **content}
