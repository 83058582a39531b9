"""The base of a model in training, its adapter, and the files that describe it."""

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers.dynamic_module_utils import custom_object_save

from neuromerge_hf.callbacks.common.places import CHECKPOINT
from neuromerge_hf.callbacks.common.weights import HuggingFaceModel, class_of, network_of, own_weights
from neuromerge_hf.errors import MergeError
from neuromerge_hf.folder.directory import atomic_directory
from neuromerge_hf.folder.replaceable import list_files
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.skeleton import Skeleton
from neuromerge_hf.spec import ModelId
from neuromerge_hf.storage.files import ADAPTER_FILES, CHECKPOINT_FILES, SHARDS
from neuromerge_hf.storage.formats import make_header
from neuromerge_hf.storage.sentence_modules import MODULES

MODEL_FILES = ("config.json", "adapter_config.json", *ADAPTER_FILES, *CHECKPOINT_FILES, *SHARDS)
"""The files of a model that another model in the same folder may lack."""

COMPARED_ENTRIES = 1 << 20
"""The number of entries of one weight that are compared with the base's."""

RELATED_COSINE = 0.5
"""The cosine above which two weights are related. It is near 1 for fine-tunes and near 0 for other models."""

REMEDY = (
    "Pass base_model=, the model that training started from. If that is no saved model, because the weights were "
    "random, save it before training with model.save_pretrained(DIR), and pass base_model=DIR."
)


def find_base(model: HuggingFaceModel, given: ModelId | None, run_folder: Path) -> str:
    """Find the base of the model in training: a folder or an id, with the revision if it is known.

    Args:
        model: the model in training.
        given: the user's choice; None for the base that transformers or PEFT recorded when they loaded the model.
        run_folder: the folder in which training saves models. None of these can be the base.

    Raises:
        MergeError: if the base is not known.
    """
    name = str(given) if given is not None else _recorded_base(model)
    if not name:
        raise MergeError(
            f"What the model in training, a {type(network_of(model)).__name__}, started from is not known. {REMEDY}"
        )
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir():
        return name
    if given is None and folder.resolve().parent == run_folder.resolve() and CHECKPOINT.fullmatch(folder.name):
        raise MergeError(f"The model in training was loaded from {folder}, which this training saved itself. {REMEDY}")
    return str(folder.absolute())


def _recorded_base(model: HuggingFaceModel) -> str | None:
    config = network_of(model).config
    adapter = adapter_config(model)
    if adapter is None or not adapter.base_model_name_or_path:
        return config._name_or_path  # transformers records no revision
    name = adapter.base_model_name_or_path
    return f"{name}@{adapter.revision}" if adapter.revision and not os.path.isdir(os.path.expanduser(name)) else name


def adapter_config(model: HuggingFaceModel) -> PeftConfig | None:
    """The configuration of the adapter in training; None if the whole model is trained.

    Raises:
        MergeError: if several adapters are active, because only one can be an expert.
    """
    if isinstance(model, PeftModel):
        active = model.active_adapters
    elif getattr(model, "_hf_peft_config_loaded", False):
        active = model.active_adapters()
    else:
        return None
    if len(active) != 1:
        raise MergeError(f"The model in training has the active adapters {active}. Only one of them can be an expert.")
    config: Any = model.peft_config[active[0]]
    return config


def expert_folder(model: HuggingFaceModel, saved: Path) -> Path:
    """The folder of the expert in a saved model's folder. It is a subfolder unless the adapter is named "default"."""
    name = model.active_adapters[0] if isinstance(model, PeftModel) else "default"
    return saved if name == "default" else saved / name


@contextmanager
def replaced_model(folder: Path) -> Iterator[Path]:
    """Yield a folder to save a model into. It replaces `folder` once it is complete.

    Other files in `folder` are kept, but not those of an earlier model, which could be taken for the new one's.
    """
    with atomic_directory(folder, overwrite=True, files_of=list_files) as made:
        if folder.is_dir():
            shutil.copytree(folder, made, symlinks=True, ignore=_model_files, dirs_exist_ok=True)
        yield made


def _model_files(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if any(fnmatch(name, pattern) for pattern in MODEL_FILES)}


def save_task_config(model: HuggingFaceModel, folder: Path) -> None:
    """Save the model's configuration beside an adapter. It names the head's labels, and PEFT does not save it.

    A SentenceTransformer has no head, and sentence-transformers does not load an adapter that has a configuration.
    """
    network = network_of(model)
    if (folder / MODULES).is_file():
        return
    if adapter_config(model) and not getattr(network, "hf_quantizer", None):
        config = copy.deepcopy(network.config)
        config.architectures = [class_of(network).__name__]
        config.save_pretrained(folder)


def save_outline(model: HuggingFaceModel, tokenizer: Any, folder: Path) -> None:
    """Save the files that a plan reads: a whole adapter, or a full model without its weights.

    The full model's weight file has a header, and holes in place of the weights.
    """
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if adapter_config(model):
        model.save_pretrained(str(folder))
        return
    network = network_of(model)
    config: Any = copy.deepcopy(network.config)
    config.architectures = [class_of(network).__name__]
    config.save_pretrained(folder)
    if network._auto_class:  # the class is custom code
        custom_object_save(network, str(folder), config=config)
    skeleton = Skeleton(class_of(network), config)  # unlike the model, it is never sharded
    tensors = skeleton.model.state_dict().items()
    header, _, size = make_header({name: (it.dtype, it.shape) for name, it in tensors if name not in skeleton.ties})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(size)


def check_related(model: HuggingFaceModel, plan: MergePlan) -> None:
    """Raise a `MergeError` if the model in training does not have the weights of its base.

    transformers records where a configuration came from, even for a model that was made from it with random weights.
    The check compares the first weight that both have in the same shape, if the base's file is on this machine.
    """
    prefix = f"{network_of(model).base_model_prefix}."
    live = own_weights(model)
    for unit in plan.units:
        if not unit.is_neuronal or not unit.tensor.path.is_file():
            continue
        names = (unit.parameter, prefix + unit.parameter, unit.parameter.removeprefix(prefix))
        ours = next((live[name] for name in names if name in live), None)
        if ours is None or tuple(ours.shape) != tuple(unit.tensor.shape) or not ours.is_floating_point():
            continue
        theirs = torch.empty(min(ours.numel(), COMPARED_ENTRIES), dtype=unit.tensor.dtype)
        unit.tensor.read(0, theirs.numel(), theirs)
        entries = ours.detach().flatten()[: theirs.numel()].to("cpu", torch.float32)
        if torch.cosine_similarity(entries, theirs.float(), dim=0) < RELATED_COSINE:
            raise MergeError(
                f"The weights of the model in training are not those of {plan.base.location}: {unit.parameter} is "
                f"unrelated. {REMEDY}"
            )
        return
