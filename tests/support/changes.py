"""Changes to the files of a model, and a check of error messages."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

EMBEDDINGS = "model.embed_tokens.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def says(message: str, *parts: object) -> bool:
    """Assert that a message has all parts, and return True. A failure names the missing parts."""
    missing = [part for part in map(str, parts) if part not in message]
    assert not missing, f"{missing} not in: {message}"
    assert "Traceback" not in message
    return True


def change_json(path: Path, **changes: object) -> None:
    """Change the entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
