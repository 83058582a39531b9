"""The task of a model class, and the Auto class that loads it."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers

TASKS = {
    "AutoModelForImageTextToText": "image-text-to-text",  # some of these are also classes for causal language models
    "AutoModelForSeq2SeqLM": None,  # some of these are also classes for causal or masked ones
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForObjectDetection": "object-detection",
    "AutoModelForSemanticSegmentation": "image-segmentation",
    "AutoModelForDepthEstimation": "depth-estimation",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModel": "feature-extraction",
}
"""The Hub's name for the task of each Auto class, in order of priority; None if the class does not determine it."""


@dataclass(frozen=True)
class Task:
    """The task of a model class.

    Attributes:
        auto_class: the name of the Auto class that loads the model class.
        pipeline_tag: the Hub's name for the task; None if the class does not determine it.
    """

    auto_class: str
    pipeline_tag: str | None


BACKBONE = Task("AutoModel", TASKS["AutoModel"])


def task_of(model_class: str | None) -> Task | None:
    """The task of a model class of transformers; None if no Auto class knows it."""
    if model_class is None:
        return None
    for auto_class, pipeline_tag in TASKS.items():
        if model_class in _class_names(auto_class):
            return Task(auto_class, pipeline_tag)
    return next((Task(name, None) for name in _other_auto_classes() if model_class in _class_names(name)), None)


def task_of_custom_class(config: Mapping[str, Any]) -> Task | None:
    """The task of a class in custom code, by the Auto class that the configuration names for it."""
    model_class = (config.get("architectures") or [""])[0]
    references = config.get("auto_map", {}).items()
    named = [auto_class for auto_class, reference in references if str(reference).rpartition(".")[2] == model_class]
    found = next((auto_class for auto_class in (*TASKS, *_other_auto_classes()) if auto_class in named), None)
    return Task(found, TASKS.get(found)) if found else None


def takes_text_alone(config: Mapping[str, Any]) -> bool:
    """Whether text is the only input that a transformers model with this configuration needs."""
    model_class = getattr(transformers, config["architectures"][0], None)
    if model_class is None:  # the inputs of custom code are not known
        return False
    needs_decoder_text = config.get("is_encoder_decoder") and task_of(model_class.__name__) == BACKBONE
    return model_class.input_modalities in ("text", ("text",)) and not needs_decoder_text


@functools.cache
def _other_auto_classes() -> list[str]:
    return sorted(name for name in dir(transformers) if name.startswith("AutoModelFor") and name not in TASKS)


@functools.cache
def _class_names(auto_class: str) -> set[str]:
    mapping = getattr(getattr(transformers, auto_class), "_model_mapping", None)
    found: set[str] = set()
    for value in getattr(mapping, "_model_mapping", {}).values():
        found.update([value] if isinstance(value, str) else value)
    return found
