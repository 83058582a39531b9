"""What a model class is for, and the Auto class that loads it."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers

TASKS = {
    "AutoModelForImageTextToText": "image-text-to-text",  # some of these classes are listed to generate text as well
    "AutoModelForSeq2SeqLM": None,  # some of these to fill masks or to generate text
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
"""The Hub's name of the task of each Auto class; None where the class alone does not tell it."""


@dataclass(frozen=True)
class Task:
    """What a model class is for.

    Attributes:
        auto_class: the name of the Auto class that loads it.
        pipeline_tag: the Hub's name of the task, if the class tells it.
    """

    auto_class: str
    pipeline_tag: str | None


BACKBONE = Task("AutoModel", TASKS["AutoModel"])


def task_of(model_class: str | None) -> Task | None:
    """The task of a model class of transformers; None for a class of which its Auto classes do not know."""
    if model_class is None:
        return None
    for auto_class, pipeline_tag in TASKS.items():
        if model_class in _class_names(auto_class):
            return Task(auto_class, pipeline_tag)
    return next((Task(name, None) for name in _other_auto_classes() if model_class in _class_names(name)), None)


def task_of_own_class(config: Mapping[str, Any]) -> Task | None:
    """The task of a class that a model's own code defines, by the Auto class that its configuration names for it."""
    model_class = (config.get("architectures") or [""])[0]
    references = config.get("auto_map", {}).items()
    named = [auto_class for auto_class, reference in references if str(reference).rpartition(".")[2] == model_class]
    found = next((auto_class for auto_class in (*TASKS, *_other_auto_classes()) if auto_class in named), None)
    return Task(found, TASKS.get(found)) if found else None


def takes_text_alone(config: Mapping[str, Any]) -> bool:
    """Whether a model of transformers that has this configuration can be called with nothing but a text."""
    model_class = getattr(transformers, config["architectures"][0], None)
    if model_class is None:  # which inputs its own code takes is not known
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
