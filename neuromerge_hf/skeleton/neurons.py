"""The axis of a parameter along which its neurons lie, from the module that owns it."""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from transformers.pytorch_utils import Conv1D

from neuromerge_hf.errors import MergeError
from neuromerge_hf.storage.layout import Layout


@dataclass(frozen=True)
class NeuronAxis:
    """The axis of a parameter along which its neurons lie.

    Attributes:
        axis: the axis of the output units.
        fused: whether the parameter is a batch of matrices (E, ...), such as the weights of fused experts.
        view: the shape in which the module uses the parameter; None for the parameter's own shape.
        linear: whether the parameter holds the matrices of linear layers, which are applied to vectors.
    """

    axis: int
    fused: bool = False
    view: tuple[int, ...] | None = None
    linear: bool = False

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """The layout of a parameter with this shape."""
        shape = self.view or shape
        layout = Layout.of_experts(shape, self.axis) if self.fused else Layout.of(shape, self.axis)
        return replace(layout, matrix=shape[self.axis]) if self.linear else layout


ROWS, COLUMNS = NeuronAxis(1, fused=True, linear=True), NeuronAxis(2, fused=True, linear=True)
"""The neuron axes of a batch of matrices (E, out, in) and of a batch (E, in, out)."""

TABLES = NeuronAxis(1, fused=True)
"""The neuron axis of a batch of embeddings (E, num, dim)."""

BATCHES = {
    "CsmCodebooksHead": COLUMNS,
    "Gemma4VisionPatchEmbedder": TABLES,
    "GroupedLinearLayer": COLUMNS,
    "InklingSharedExperts": ROWS,
    "JetMoeParallelExperts": ROWS,
    "KyutaiSpeechToTextFlexibleLinear": ROWS,
    "Llama4TextExperts": COLUMNS,
    "LongcatFlashExperts": ROWS,
    "MoshiFlexibleLinear": ROWS,
    "RecurrentGemmaRglru": COLUMNS,
    "Step3p7Experts": ROWS,
}
"""The neuron axes of transformers' classes whose parameters are batches of matrices, according to their `forward`.

Classes with transformers' `use_experts_implementation` declare the axis themselves."""

TRANSPOSED = {
    "AMSoftmaxLoss.weight",
    "Gemma3MultiModalProjector.mm_input_projection_weight",
    "Inkling2RelativeLogits.proj",
    "InklingRelativeLogits.proj",
    "OmDetTurboLanguageBackbone.text_projection",
    "SwiftFormerEfficientAdditiveAttention.w_g",
    "T5Gemma2MultiModalProjector.mm_input_projection_weight",
    "XCLIPModel.prompts_visual_projection",
}
"""Parameters of transformers' classes that are matrices (in, out), according to their `forward`."""


def neuron_axis(module: nn.Module, attribute: str, shape: tuple[int, ...]) -> NeuronAxis | None:
    """The neuron axis of a module's parameter; None if it is not neuronal.

    It is the output axis of Linear, Conv1D, convolutions and fused experts, and the token axis of an Embedding. A
    matrix of any other module has its output units as rows, as in torch.nn.functional.linear, unless it is known to be
    transposed.

    Raises:
        MergeError: for a batch of matrices of a class whose neuron axis is not known.
    """
    if len(shape) < 2:
        return None
    if isinstance(module, _ConvNd) and shape != tuple(module.weight.shape):
        return None  # the magnitudes of weight_norm are gates, which have no neurons
    if isinstance(module, Conv1D | _ConvTransposeNd):
        return NeuronAxis(1, linear=isinstance(module, Conv1D))
    if isinstance(module, _ConvNd | nn.Linear | nn.Embedding):
        return NeuronAxis(0, linear=isinstance(module, nn.Linear))
    if "DbrxExpertGLU" in _class_names(module) and attribute == "w2":
        owner: Any = module
        return NeuronAxis(2, fused=True, view=(owner.moe_num_experts, owner.ffn_hidden_size, shape[1]), linear=True)
    if any(f"{name}.{attribute}" in TRANSPOSED for name in _class_names(module)):
        return NeuronAxis(1)
    declares_axis = hasattr(module, "is_transposed")
    is_parameter = isinstance(getattr(module, attribute, None), nn.Parameter)
    if is_parameter and len(shape) == 3 and (declares_axis or min(shape) > 1):
        return _batch_axis(module, attribute)
    if declares_axis or any(len(each.shape) == 3 and min(each.shape) > 1 for each in module.parameters(False)):
        return None  # a matrix (E, out) beside fused experts holds their biases
    wide = [axis for axis, size in enumerate(shape) if size > 1]
    # Class tokens (1, 1, n) and scales of heads (n, 1, 1) are single vectors. (1, positions, n) is an embedding.
    return NeuronAxis(wide[0]) if len(wide) > 1 else None


def _batch_axis(module: nn.Module, attribute: str) -> NeuronAxis:
    if hasattr(module, "is_transposed"):
        return COLUMNS if module.is_transposed else ROWS
    known = _class_names(module) & BATCHES.keys()
    if known:
        return BATCHES[known.pop()]
    raise MergeError(
        f"{attribute} of {type(module).__name__} is a batch of matrices, and it is not known along which axis "
        "their neurons lie. Exclude it (exclude=), so that it is the base's."
    )


def _class_names(module: nn.Module) -> set[str]:
    """The names of the transformers classes among a module's class and its base classes."""
    return {kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("transformers.")}
