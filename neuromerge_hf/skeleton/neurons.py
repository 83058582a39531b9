"""Along which axis of a parameter its neurons lie, from the module that owns it (ALGORITHM.md, section 1)."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from transformers.pytorch_utils import Conv1D

from neuromerge_hf.errors import MergeError
from neuromerge_hf.storage.layout import Layout


@dataclass(frozen=True)
class NeuronAxis:
    """Along which axis of a parameter its neurons lie.

    Attributes:
        axis: the output units.
        fused: the parameter is a batch of matrices (E, ...), the weights of fused experts, say.
        view: the shape in which the module uses the parameter, if not its own.
    """

    axis: int
    fused: bool = False
    view: tuple[int, ...] | None = None

    def layout(self, shape: tuple[int, ...]) -> Layout:
        shape = self.view or shape
        return Layout.of_experts(shape, self.axis) if self.fused else Layout.of(shape, self.axis)


ROWS, COLUMNS = NeuronAxis(1, fused=True), NeuronAxis(2, fused=True)
"""The neurons of a batch of matrices (E, out, in), and of one (E, in, out)."""

BATCHES = {
    "CsmCodebooksHead": COLUMNS,
    "Gemma4VisionPatchEmbedder": ROWS,
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
"""Classes of transformers whose parameters are batches of matrices and which do not say how these lie: as their
`forward` uses them. Classes with transformers' `use_experts_implementation` say it themselves."""

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
"""Parameters of transformers' classes that are matrices (in, out), as their `forward` uses them."""


def neuron_axis(module: nn.Module, attribute: str, shape: tuple[int, ...]) -> NeuronAxis | None:
    """Where the neurons of a module's parameter are; None if it is not neuronal.

    The output axis of Linear, Conv1D, convolutions and fused experts, the tokens of an Embedding. A matrix that belongs
    to a module of another class is taken as torch.nn.functional.linear takes it, its rows as output units, where it is
    not known to be transposed.

    Raises:
        MergeError: for a batch of matrices of a class of which it is not known how they lie.
    """
    if len(shape) < 2:
        return None
    if isinstance(module, _ConvNd) and shape != tuple(module.weight.shape):
        return None  # the magnitudes of a weight_norm: a gate
    if isinstance(module, Conv1D | _ConvTransposeNd):
        return NeuronAxis(1)
    if isinstance(module, _ConvNd | nn.Linear | nn.Embedding):
        return NeuronAxis(0)
    if "DbrxExpertGLU" in _names(module) and attribute == "w2":
        owner: Any = module
        return NeuronAxis(2, fused=True, view=(owner.moe_num_experts, owner.ffn_hidden_size, shape[1]))
    if any(f"{name}.{attribute}" in TRANSPOSED for name in _names(module)):
        return NeuronAxis(1)
    says = hasattr(module, "is_transposed")
    is_parameter = isinstance(getattr(module, attribute, None), nn.Parameter)
    if is_parameter and len(shape) == 3 and (says or min(shape) > 1):
        return _batch_axis(module, attribute)
    if says or any(len(parameter.shape) == 3 and min(parameter.shape) > 1 for parameter in module.parameters(False)):
        return None  # (E, out) beside fused experts: their biases
    wide = [axis for axis, size in enumerate(shape) if size > 1]
    # (1, 1, n), a class token, and (n, 1, 1), scales of heads, are one vector; (1, positions, n) is an embedding.
    return NeuronAxis(wide[0]) if len(wide) > 1 else None


def _batch_axis(module: nn.Module, attribute: str) -> NeuronAxis:
    if hasattr(module, "is_transposed"):
        return COLUMNS if module.is_transposed else ROWS
    known = _names(module) & BATCHES.keys()
    if known:
        return BATCHES[known.pop()]
    raise MergeError(
        f"{attribute} of {type(module).__name__} is a batch of matrices, and it is not known along which axis "
        "their neurons lie. Exclude it (exclude=), so that it is the base's."
    )


def _names(module: nn.Module) -> set[str]:
    """The names of a module's class and its parents, as far as they are transformers' own."""
    return {kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("transformers.")}
