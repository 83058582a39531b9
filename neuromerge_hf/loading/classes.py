"""Choosing the class that loads a merged model."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from neuromerge_hf.errors import MergeError
from neuromerge_hf.skeleton import model_class_of
from neuromerge_hf.skeleton.config import read_config


def class_of_files(folder: Path, auto_class: Any = None, *, trust_remote_code: bool = False) -> type[PreTrainedModel]:
    """Find the class that loads a model's files.

    Args:
        folder: the folder with the model's ``config.json``.
        auto_class: an Auto class or a model class of transformers; None for the class that the configuration names.
        trust_remote_code: run the model's custom code if the configuration names a class in it.

    Returns:
        A model class, never an Auto class.

    Raises:
        MergeError: if `auto_class` is neither an Auto class nor a model class.
    """
    if isinstance(auto_class, type) and issubclass(auto_class, PreTrainedModel):
        return auto_class
    config = read_config(folder, trust_remote_code)
    if auto_class is None:
        return model_class_of(config, folder, trust_remote_code)
    if not (isinstance(auto_class, type) and issubclass(auto_class, _BaseAutoModelClass)):
        raise MergeError(f"auto_class must be an Auto class or a model class of transformers, not {auto_class!r}.")
    # An Auto class does more than look up a class: it also registers custom code to be saved with the model.
    with torch.device("meta"):
        return type(auto_class.from_config(config, trust_remote_code=trust_remote_code))
