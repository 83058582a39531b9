"""The model class on the meta device: the one authority on parameter names, shapes, ties, stored forms, and neurons."""

from neuromerge_hf.skeleton.classes import auto_model_class, model_class_of
from neuromerge_hf.skeleton.conversion import ParameterRef, Shape, StoredForm
from neuromerge_hf.skeleton.limits import most_parts
from neuromerge_hf.skeleton.model import Skeleton, skeleton_of
from neuromerge_hf.skeleton.neurons import NeuronAxis

__all__ = [
    "NeuronAxis",
    "ParameterRef",
    "Shape",
    "Skeleton",
    "StoredForm",
    "auto_model_class",
    "model_class_of",
    "most_parts",
    "skeleton_of",
]
