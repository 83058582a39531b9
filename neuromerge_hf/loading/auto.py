"""`AutoMergedModel`: merge, or find the finished merge, and load it as a plain transformers model."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedModel

from neuromerge_hf.api import merge
from neuromerge_hf.config import MergeConfig, NeuroMergingConfig
from neuromerge_hf.errors import MergeError
from neuromerge_hf.folder.directory import directory_in_the_making
from neuromerge_hf.folder.recipe import RECIPE_NAME, fingerprint
from neuromerge_hf.loading.merged_model import as_merged_model
from neuromerge_hf.planning.planner import plan_found
from neuromerge_hf.planning.resolve import ModelId, find_models
from neuromerge_hf.skeleton import model_class_of
from neuromerge_hf.storage.files import CHECKPOINT_FILES, HEAD_WEIGHTS, HEADS, find_weights, weight_files
from neuromerge_hf.storage.location import Location, locate

LINKED_HEAD = "task_head.safetensors"
"""transformers reads a model's files by name and keeps the last tensor of a name, so this one is after the base's."""


class AutoMergedModel:
    """Merges experts into their base, and loads the result as its architecture's own transformers class."""

    def __init__(self) -> None:
        raise TypeError("AutoMergedModel is made with AutoMergedModel.from_pretrained([...]).")

    @classmethod
    def from_pretrained(
        cls,
        models: Sequence[ModelId] | ModelId,
        *,
        base_model: ModelId | None = None,
        config: MergeConfig | None = None,
        tokenizer: str = "base",
        chat_template: str | None = None,
        merge_heads: bool = False,
        auto_class: Any = None,
        head: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Merge the experts, or find their finished merge in the cache, and load it.

        Args:
            models: the experts, as in `neuromerge_hf.merge`; or one folder or id of a model that is already merged.
            base_model: the model that they were fine-tuned from; found from the adapters where they agree.
            config: the method and its hyper-parameters, as in `neuromerge_hf.merge`.
            tokenizer, chat_template, merge_heads: see `neuromerge_hf.merge`.
            auto_class: an Auto class or a model class of transformers to load the merged model as. Default: the
                experts' own, or the base's where they differ or have heads of their own.
            head: the name of an expert (see `MergeReport.experts`), to load the merged backbone with that expert's own
                task head, as its task model.
            cache_dir: where finished merges are kept; ``neuromerge`` in the Hub's home folder.
            device: where the merge computes; the accelerator that accelerate sees, or the CPU.
            **kwargs: anything that transformers' `from_pretrained` takes: ``dtype``, ``device_map``, ``max_memory``,
                ``quantization_config``, ``token``, ``trust_remote_code``, ...

        Returns:
            A plain transformers model in evaluation mode, placed by accelerate. Its `save_pretrained` and
            `push_to_hub` add tokenizer, recipe, report, heads and model card, see `merged_model.MergedModelMixin`.

        Raises:
            MergeError: if the models cannot be merged, or `head` names no expert with a head.
        """
        cache = Path(cache_dir or Path(constants.HF_HOME, "neuromerge")).expanduser()
        token, trust_remote_code = kwargs.get("token"), kwargs.get("trust_remote_code", False)
        revision = kwargs.pop("revision", None)
        if isinstance(models, str | os.PathLike):
            location = locate(models, revision=revision, token=token)
            if not (location.folder / RECIPE_NAME).is_file():
                raise MergeError(f"{location} is not a merged model. Give the experts as a list.")
            location.fetch_weights()
            if head and location.commit:
                heads = [f"{HEADS}/*/config.json", f"{HEADS}/{head}/*"]
                location.download(heads, ignore=None)
        elif revision is not None:
            raise MergeError(f"Each model has its own revision: write it as id@{revision}, and leave revision= out.")
        else:
            settings = {
                "config": config or NeuroMergingConfig(),
                "tokenizer": tokenizer,
                "chat_template": chat_template,
                "merge_heads": merge_heads,
            }
            merged = _find_or_merge(models, base_model, settings, cache, device, token, trust_remote_code)
            location = Location(str(merged), merged)
        folder = location.folder if head is None else _with_head(location.folder, head, cache)
        loaded_config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if auto_class is None:
            auto_class = model_class_of(loaded_config, folder, trust_remote_code)
        loaded = auto_class.from_pretrained(folder, **kwargs)
        model = loaded[0] if kwargs.get("output_loading_info") else loaded
        as_merged_model(model, location, cache / "pushes", head, loaded_config)
        return loaded


def _find_or_merge(
    models: Sequence[ModelId],
    base_model: ModelId | None,
    settings: dict[str, Any],
    cache: Path,
    device: str | torch.device | None,
    token: str | bool | None,
    trust_remote_code: bool,
) -> Path:
    found = find_models(models, base_model, token)
    if found.problems:
        plan_found(found, **settings, trust_remote_code=trust_remote_code)  # raises them, with what else is wrong
    folder = cache / fingerprint(found.base, found.experts, *settings.values())
    if not folder.is_dir():
        try:
            merge(
                [_reference(location) for location in found.experts],
                folder,
                base_model=_reference(found.base),
                **settings,
                device=device,
                token=token,
                trust_remote_code=trust_remote_code,
            )
        except (MergeError, OSError):
            if not folder.is_dir():  # else another process finished the same merge meanwhile
                raise
    return folder


def _reference(location: Location) -> str:
    return f"{location.id}@{location.commit}" if location.commit else location.id


def _with_head(folder: Path, head: str, cache: Path) -> Path:
    """A folder of links in which the merged weights stand together with one expert's head."""
    heads = sorted(path.name for path in (folder / HEADS).iterdir()) if (folder / HEADS).is_dir() else []
    if head not in heads:
        raise MergeError(
            f"head={head!r} names no expert with a head of its own. "
            + (f"There are: {', '.join(heads)}." if heads else "No expert of this merge has one: leave head= out.")
        )
    identity = f"{folder.resolve()} {(folder / RECIPE_NAME).stat().st_mtime_ns}"
    target = cache / "heads" / hashlib.sha256(identity.encode()).hexdigest()[:32] / head
    if not target.is_dir():
        try:
            with directory_in_the_making(target, overwrite=False) as made:
                _link(folder, folder / HEADS / head, made)
        except (MergeError, OSError):
            if not target.is_dir():  # else another process finished the same links meanwhile
                raise
    return target


def _link(folder: Path, source: Path, made: Path) -> None:
    """Fill `made` with links to the merged weights in `folder` and to the head in `source`."""
    main = find_weights(folder, CHECKPOINT_FILES)
    if main is None:
        raise MergeError(f"{folder} has no weights. Merge the models again.")
    for path in folder.iterdir():
        if path.is_file() and path.name not in ("config.json", "model.safetensors.index.json"):
            (made / path.name).symlink_to(path.resolve())
    (made / LINKED_HEAD).symlink_to((source / HEAD_WEIGHTS).resolve())
    weight_map = {}
    for path in [*weight_files(main), made / LINKED_HEAD]:
        with safe_open(path, "pt") as file:
            weight_map.update(dict.fromkeys(file.keys(), path.name))
    if (made / "model.safetensors").is_symlink():
        # Beside an index, transformers would read this file alone.
        (made / "model.safetensors").rename(made / "model-merged.safetensors")
        weight_map = {
            key: name.replace("model.safetensors", "model-merged.safetensors") for key, name in weight_map.items()
        }
    index = {"metadata": {}, "weight_map": weight_map}
    (made / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((source / "config.json").read_text())
    merged = json.loads((folder / "config.json").read_text())
    config["dtype"] = merged.get("dtype", merged.get("torch_dtype"))
    (made / "config.json").write_text(json.dumps(config))
