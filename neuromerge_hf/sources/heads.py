"""Task heads: parameters that an expert has and the base lacks. They have no task vectors and are kept unmerged."""

import copy
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel

from neuromerge_hf.errors import MergeError
from neuromerge_hf.skeleton import auto_model_class, skeleton_of
from neuromerge_hf.skeleton.config import read_config
from neuromerge_hf.storage.files import HEAD_WEIGHTS
from neuromerge_hf.storage.finite import is_finite
from neuromerge_hf.storage.tensors import StoredTensor, read_whole

TASK_CLASSES = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}
"""The Auto class of the models that PEFT adapts for each task type."""


@dataclass(frozen=True)
class Head:
    """The parameters that an expert has and the base lacks.

    Attributes:
        config: the configuration of the expert's task model, whose `architectures` names its class.
        tensors: the stored tensors by their names in the task model.
    """

    config: PretrainedConfig
    tensors: dict[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        """The size of the tensors in bytes."""
        return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in self.tensors.values())

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and ``head.safetensors`` into a new folder.

        Raises:
            MergeError: if a weight is NaN or infinite.
            OSError: if the files cannot be written.
        """
        folder.mkdir(parents=True)
        self.config.to_json_file(folder / "config.json")
        tensors = {name: read_whole(tensor) for name, tensor in sorted(self.tensors.items())}
        for name, tensor in tensors.items():
            if not is_finite(tensor):
                raise MergeError(
                    f"{name} of {folder.name}'s own head holds a NaN or an infinity ({self.tensors[name].path}). "
                    "A damaged model cannot be merged: train or download it again, or leave it out."
                )
        try:
            save_file(tensors, folder / HEAD_WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:  # it hides the system's error, such as a full disk
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder / HEAD_WEIGHTS)) from error


def task_class(task_type: str | None, config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The model class that PEFT adapts for a task type; None without a task type or a class for it."""
    auto_class = TASK_CLASSES.get(task_type) if task_type else None
    try:
        found = auto_model_class(auto_class, config) if auto_class else None
    except KeyError:  # this architecture has no model for the task
        return None
    # For a model with images it can be the text model, which has another configuration and is not merged.
    return found if found and found.config_class is type(config) else None


def task_config(
    base_config: PretrainedConfig,
    folder: Path,
    model_class: type[PreTrainedModel] | None,
    tensors: dict[str, StoredTensor],
) -> PretrainedConfig:
    """The configuration of an adapter's task model.

    It is the ``config.json`` beside the adapter if there is one (PEFT saves none), else the base's configuration with
    the number of labels that fits the head. `architectures` is None in it if the adapter does not name its task.
    """
    if (folder / "config.json").is_file():
        return read_config(folder)
    config = copy.deepcopy(base_config)
    config.architectures = [model_class.__name__] if model_class else None
    if model_class is None:
        return config
    for num_labels in sorted({tensor.shape[0] for tensor in tensors.values() if tensor.shape}):
        sized = copy.deepcopy(config)
        sized.num_labels = num_labels
        shapes = skeleton_of(model_class, sized).shapes
        if all(shapes.get(name, tensor.shape) == tensor.shape for name, tensor in tensors.items()):
            return sized
    return config
