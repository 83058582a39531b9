"""Loading a merged backbone with an expert's task head.

A folder of links brings the merged weights and the head together. transformers loads it like any other model, so dtype,
device map, quantisation and conversion work as usual.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch.nn import Identity
from transformers import PreTrainedModel

from neuromerge_hf.errors import MergeError
from neuromerge_hf.folder.directory import atomic_directory
from neuromerge_hf.loading.classes import class_of_files
from neuromerge_hf.storage.documents import load_json
from neuromerge_hf.storage.files import CHECKPOINT_FILES, HEAD_WEIGHTS, find_weights, weight_files
from neuromerge_hf.storage.temporary import remove_leftovers

INDEX = "model.safetensors.index.json"

LINKED_WEIGHTS = "model-merged.safetensors"
"""The link to a single weight file. If it were named ``model.safetensors``, transformers would ignore the index."""

LINKED_HEAD = "task_head.safetensors"
"""The link to the head. transformers reads files in the order of their names, so it overrides the merge's own head."""


def load_with_head(
    folder: Path, heads: Path, name: str, cache: Path, parameter: str = "head", **kwargs: Any
) -> PreTrainedModel:
    """Load a merged backbone with an expert's head.

    Args:
        folder: the merged model.
        heads: the folder of the experts' heads, one folder for each expert.
        name: the name of the expert whose head is loaded.
        cache, parameter: see `folder_with_head`.
        **kwargs: other arguments of transformers' `from_pretrained`.

    Returns:
        The expert's task model, in evaluation mode.

    Raises:
        MergeError: if the expert has no head.
    """
    linked = folder_with_head(folder, heads, name, cache, parameter)
    model_class = class_of_files(linked, trust_remote_code=kwargs.get("trust_remote_code", False))
    model: PreTrainedModel = model_class.from_pretrained(linked, **kwargs)
    return model


def share_backbone(task_model: PreTrainedModel, live: PreTrainedModel) -> PreTrainedModel:
    """Replace a task model's backbone by the backbone of a live model. Both models then share it.

    Args:
        task_model: a model of the same architecture. Its head is moved to the device of `live`.
        live: the model whose backbone is shared.

    Returns:
        `task_model`.
    """
    setattr(task_model, task_model.base_model_prefix, Identity())
    task_model.to(live.device)  # type: ignore[arg-type]  # transformers wraps torch's method, and its type is lost
    setattr(task_model, task_model.base_model_prefix, live.base_model)
    return task_model


def folder_with_head(folder: Path, heads: Path, name: str, cache: Path, parameter: str = "head") -> Path:
    """Make a folder from which transformers loads the merged weights together with one expert's head.

    Args:
        folder: the merged model.
        heads: the folder of the experts' heads, one folder for each expert.
        name: the name of the expert whose head is linked.
        cache: the folder in which it is made. A folder from an earlier call is reused.
        parameter: the argument that names the expert, for error messages.

    Returns:
        The folder. It holds links, so `folder` and `heads` must stay in place.

    Raises:
        MergeError: if the expert has no head, or the merged model has no weights.
    """
    names = sorted(path.name for path in heads.iterdir()) if heads.is_dir() else []
    if name not in names:
        raise MergeError(
            f"{parameter}={name!r} names no expert with a head of its own. "
            + (f"There are: {', '.join(names)}." if names else "No expert of this merge has one: leave it out.")
        )
    main = find_weights(folder, CHECKPOINT_FILES)
    if main is None:
        raise MergeError(f"{folder} has no weights. Merge the models again.")
    identity = f"{folder.resolve()} {heads.resolve()} {main.stat().st_mtime_ns}"
    target = cache / "heads" / hashlib.sha256(identity.encode()).hexdigest()[:32] / name
    remove_leftovers(target.parent)  # a folder that is there is not made again, which would remove them
    if not target.is_dir():
        try:
            with atomic_directory(target, overwrite=False) as made:
                _link(main, heads / name, made)
        except (MergeError, OSError):
            if not target.is_dir():  # otherwise another process has made the same folder
                raise
    return target


def _link(main: Path, head: Path, made: Path) -> None:
    """Fill the folder `made` with links to a head and to the files beside the merged weights `main`."""
    folder = main.parent
    for path in folder.iterdir():
        if path.is_file() and path.name not in ("config.json", INDEX):
            name = LINKED_WEIGHTS if path.name == "model.safetensors" else path.name
            (made / name).symlink_to(path.resolve())
    (made / LINKED_HEAD).symlink_to((head / HEAD_WEIGHTS).resolve())
    weight_map: dict[str, str] = {}
    for path in [*weight_files(main), made / LINKED_HEAD]:
        name = LINKED_WEIGHTS if path == folder / "model.safetensors" else path.name
        with safe_open(path, "pt") as file:
            weight_map |= dict.fromkeys(file.keys(), name)
    (made / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = load_json(head / "config.json")
    merged = load_json(folder / "config.json")
    config["dtype"] = merged.get("dtype", merged.get("torch_dtype"))
    (made / "config.json").write_text(json.dumps(config))
