"""The model class of a configuration."""

from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from neuromerge_hf.errors import MergeError


def model_class_of(
    config: PretrainedConfig,
    folder: Path,
    trust_remote_code: bool = False,
    default: type[PreTrainedModel] | None = None,
) -> type[PreTrainedModel]:
    """The class that a configuration's `architectures` names.

    Args:
        folder: the folder of the model's custom code, which runs only with `trust_remote_code`.
        default: the class to return if none is named or known; None returns the plain backbone.

    Raises:
        MergeError: if the name is that of something else in transformers.
    """
    architecture = (config.architectures or [""])[0]
    references = (getattr(config, "auto_map", None) or {}).values()
    remote = {reference.rpartition(".")[2]: reference for reference in references if isinstance(reference, str)}
    if architecture in remote and trust_remote_code:
        return get_class_from_dynamic_module(remote[architecture], folder)
    named = getattr(transformers, architecture, None)
    is_model = isinstance(named, type) and issubclass(named, PreTrainedModel) and named is not PreTrainedModel
    if named is not None and not is_model:
        raise MergeError(
            f'it names {architecture} as the model\'s class ("architectures"), which is no model '
            "class of transformers. Name the class that the weights were trained as."
        )
    return named or default or auto_model_class(transformers.AutoModel, config)


def auto_model_class(auto_class: type[_BaseAutoModelClass], config: PretrainedConfig) -> type[PreTrainedModel]:
    """The model class that an Auto class chooses for a configuration.

    Raises:
        KeyError: if it has none for this configuration.
    """
    mapping: Any = auto_class._model_mapping
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found
