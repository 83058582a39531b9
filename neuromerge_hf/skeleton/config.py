"""Reading the configuration of a model."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from neuromerge_hf.errors import MergeError
from neuromerge_hf.storage.documents import load_json, reading
from neuromerge_hf.typed import fits, words

TYPES: dict[str, Any] = {
    "architectures": list[str] | None,
    "auto_map": dict[str, Any] | None,
    "quantization_config": dict[str, Any] | None,
    "base_model_tp_plan": dict[str, Any] | None,
    "base_model_pp_plan": dict[str, Any] | None,
    "dtype": str | dict[str, Any] | None,
    "torch_dtype": str | dict[str, Any] | None,
}
"""The types of settings that this library reads itself. transformers checks them for few models."""


def read_config(folder: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read the ``config.json`` in a model's folder as transformers does.

    Raises:
        MergeError: if it cannot be read, a setting has the wrong type, or it needs code that is not trusted.
    """
    path = folder / "config.json"
    settings = load_json(path)
    for name, annotation in TYPES.items():
        if not fits(settings.get(name), annotation):
            raise MergeError(f"{path} cannot be read: {name} must be {words(annotation)}, not {settings[name]!r:.200}.")
    with reading(path):
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            if "trust_remote_code=True" not in str(error):
                raise
            raise MergeError(
                f"{folder} has a class of its own, whose code lies beside its weights. Read that code; if you trust "
                "it, let it run with trust_remote_code=True (--trust-remote-code)."
            ) from error
    return config
