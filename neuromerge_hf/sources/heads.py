"""Task heads: what an expert has and the base does not. They have no task vector, so each is kept as it is."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from neuromerge_hf.skeleton import Skeleton, auto_model_class
from neuromerge_hf.storage.files import HEAD_WEIGHTS
from neuromerge_hf.storage.tensors import StoredTensor, read_whole

TASK_CLASSES = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}
"""The Auto class on which PEFT puts an adapter of each task type."""


@dataclass(frozen=True)
class Head:
    """An expert's own parameters.

    Attributes:
        config: the configuration of the expert's task model, whose `architectures` names its class.
        tensors: by their name in the task model.
    """

    config: PretrainedConfig
    tensors: dict[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        """The size of the tensors."""
        return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in self.tensors.values())

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and ``head.safetensors``."""
        folder.mkdir(parents=True)
        self.config.to_json_file(folder / "config.json")
        tensors = {name: read_whole(tensor) for name, tensor in sorted(self.tensors.items())}
        save_file(tensors, folder / HEAD_WEIGHTS, metadata={"format": "pt"})


def task_class(task_type: str | None, config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The model class on which PEFT puts an adapter of this task type; None if the adapter does not name its task."""
    auto_class = TASK_CLASSES.get(task_type) if task_type else None
    try:
        found = auto_model_class(auto_class, config) if auto_class else None
    except KeyError:  # this architecture has no model for the task
        return None
    # The text model of a model with images takes another configuration, and is not the model that is merged.
    return found if found and found.config_class is type(config) else None


def task_config(
    base_config: PretrainedConfig,
    folder: Path,
    model_class: type[PreTrainedModel] | None,
    tensors: dict[str, StoredTensor],
) -> PretrainedConfig:
    """The configuration of an adapter's task model.

    It is the ``config.json`` beside the adapter where there is one (PEFT saves none), else the base's, with the number
    of labels that fits the head. Its `architectures` is empty where the adapter does not name its task.
    """
    if (folder / "config.json").is_file():
        return AutoConfig.from_pretrained(folder)
    config = copy.deepcopy(base_config)
    config.architectures = [model_class.__name__] if model_class else None
    if model_class is None:
        return config
    for num_labels in sorted({tensor.shape[0] for tensor in tensors.values() if tensor.shape}):
        sized = copy.deepcopy(config)
        sized.num_labels = num_labels
        shapes = Skeleton(model_class, sized).shapes
        if all(shapes.get(name, tensor.shape) == tensor.shape for name, tensor in tensors.items()):
            return sized
    return config
