"""Where `Skeleton` finds neurons, against what modules compute: an output unit answers to its own neuron alone.

Also against the layouts that `families` states for whole models, and stored tensors against tensors in memory.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.models.convbert import modeling_convbert as convbert
from transformers.models.csm import modeling_csm as csm
from transformers.models.dbrx import modeling_dbrx as dbrx
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.inkling import modeling_inkling as inkling
from transformers.models.jetmoe import modeling_jetmoe as jetmoe
from transformers.models.kyutai_speech_to_text import modeling_kyutai_speech_to_text as kyutai_speech_to_text
from transformers.models.llama4 import modeling_llama4 as llama4
from transformers.models.longcat_flash import modeling_longcat_flash as longcat_flash
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.moshi import modeling_moshi as moshi
from transformers.models.step3p7 import modeling_step3p7 as step3p7
from transformers.pytorch_utils import Conv1D

from families import FAMILIES, Relatives
from neuromerge_hf.errors import MergeError
from neuromerge_hf.skeleton import NeuronAxis, Skeleton
from neuromerge_hf.skeleton.neurons import neuron_axis
from neuromerge_hf.storage.layout import Layout
from reference import Neurons

ROUTED = transformers.MixtralConfig(hidden_size=6, intermediate_size=4, num_local_experts=3)
FUSED = transformers.GptOssConfig(hidden_size=6, intermediate_size=4, num_local_experts=3)


class Zoo(transformers.PreTrainedModel):
    """A module of every kind whose neurons are known."""

    config_class = transformers.BertConfig

    def __init__(self, config: transformers.PretrainedConfig):
        super().__init__(config)
        self.linear = nn.Linear(3, 4)
        self.square = nn.Linear(4, 4, bias=False)
        self.conv1d = Conv1D(4, 3)
        self.square_conv1d = Conv1D(4, 4)
        self.convolution = nn.Conv2d(2, 4, (3, 2))
        self.in_groups = nn.Conv1d(4, 6, 3, groups=2)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.transposed = nn.ConvTranspose2d(2, 4, (3, 2))
        self.square_transposed = nn.ConvTranspose1d(4, 4, 3)
        self.transposed_in_groups = nn.ConvTranspose1d(4, 6, 3, groups=2)
        self.embedding = nn.Embedding(5, 3)
        self.bag = nn.EmbeddingBag(5, 3)
        self.norm = nn.LayerNorm(4)
        self.batch_norm = nn.BatchNorm1d(4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.routed = MixtralExperts(ROUTED)
        self.fused = GptOssExperts(FUSED)
        self.normalised = weight_norm(nn.Conv1d(2, 4, 3))
        self.gate = nn.Parameter(torch.zeros(()))
        self.class_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.positions = nn.Parameter(torch.zeros(1, 5, 4))
        self.projection = nn.Parameter(torch.zeros(5, 4))
        self.post_init()


@pytest.fixture(scope="module")
def zoo() -> Skeleton:
    return Skeleton(Zoo, transformers.BertConfig())


ROWS, COLUMNS = NeuronAxis(0), NeuronAxis(1)
LINEAR, LINEAR_COLUMNS = NeuronAxis(0, linear=True), NeuronAxis(1, linear=True)

AXES = {
    "linear.weight": LINEAR,
    "linear.bias": None,
    "square.weight": LINEAR,
    "conv1d.weight": LINEAR_COLUMNS,
    "conv1d.bias": None,
    "square_conv1d.weight": LINEAR_COLUMNS,
    "square_conv1d.bias": None,
    "convolution.weight": ROWS,
    "convolution.bias": None,
    "in_groups.weight": ROWS,
    "in_groups.bias": None,
    "depthwise.weight": ROWS,
    "depthwise.bias": None,
    "transposed.weight": COLUMNS,
    "transposed.bias": None,
    "square_transposed.weight": COLUMNS,
    "square_transposed.bias": None,
    "transposed_in_groups.weight": COLUMNS,
    "transposed_in_groups.bias": None,
    "embedding.weight": ROWS,
    "bag.weight": ROWS,
    "norm.weight": None,
    "norm.bias": None,
    "batch_norm.weight": None,
    "batch_norm.bias": None,
    "batch_norm.running_mean": None,
    "batch_norm.running_var": None,
    "batch_norm.num_batches_tracked": None,
    "attention.in_proj_weight": ROWS,
    "attention.in_proj_bias": None,
    "attention.out_proj.weight": LINEAR,
    "attention.out_proj.bias": None,
    "routed.gate_up_proj": NeuronAxis(1, fused=True, linear=True),
    "routed.down_proj": NeuronAxis(1, fused=True, linear=True),
    "fused.gate_up_proj": NeuronAxis(2, fused=True, linear=True),
    "fused.gate_up_proj_bias": None,
    "fused.down_proj": NeuronAxis(2, fused=True, linear=True),
    "fused.down_proj_bias": None,
    "normalised.bias": None,
    "normalised.parametrizations.weight.original0": None,  # one magnitude for each output unit
    "normalised.parametrizations.weight.original1": ROWS,
    "gate": None,
    "class_token": None,
    "positions": NeuronAxis(1),
    "projection": ROWS,
}


def test_every_kind_of_parameter_has_its_neurons_along_the_right_axis(zoo: Skeleton) -> None:
    assert {name: zoo.neuron_axis(name) for name in zoo.shapes} == AXES


UNITS = {
    "linear.weight": (lambda x, w: nn.functional.linear(x, w), torch.ones(2, 3)),
    "square.weight": (lambda x, w: nn.functional.linear(x, w), torch.ones(2, 4)),
    "convolution.weight": (lambda x, w: nn.functional.conv2d(x, w).flatten(2).sum(2), torch.ones(1, 2, 4, 4)),
    "in_groups.weight": (lambda x, w: nn.functional.conv1d(x, w, groups=2).sum(2), torch.ones(1, 4, 5)),
    "transposed.weight": (lambda x, w: nn.functional.conv_transpose2d(x, w).flatten(2).sum(2), torch.ones(1, 2, 2, 2)),
    "square_transposed.weight": (lambda x, w: nn.functional.conv_transpose1d(x, w).sum(2), torch.ones(1, 4, 2)),
}


def only_neuron(layout: Layout, shape: tuple[int, ...], neuron: int) -> Tensor:
    """A weight that is 1 in one neuron and 0 elsewhere."""
    weight = torch.zeros(shape).flatten()
    for block in layout.blocks(1):
        if block.batch * layout.neurons + block.start == neuron:
            for start, stop in layout.runs(block):
                weight[start:stop] = 1
    return weight.view(shape)


@pytest.mark.parametrize("name", UNITS)
def test_an_output_unit_answers_to_its_neuron_alone(name: str, zoo: Skeleton) -> None:
    compute, example = UNITS[name]
    layout = zoo.neuron_axis(name).layout(zoo.shapes[name])
    for neuron in range(layout.rows):
        answering = compute(example, only_neuron(layout, zoo.shapes[name], neuron)).any(0)
        assert answering.nonzero().flatten().tolist() == [neuron]


@pytest.mark.parametrize("name", ["conv1d", "square_conv1d"])
def test_an_output_unit_of_conv1d_answers_to_its_column(name: str, zoo: Skeleton) -> None:
    shape = zoo.shapes[f"{name}.weight"]
    layout = zoo.neuron_axis(f"{name}.weight").layout(shape)
    module = Conv1D(shape[1], shape[0])
    for neuron in range(layout.rows):
        module.weight.data = only_neuron(layout, shape, neuron)
        assert module(torch.ones(1, shape[0])).nonzero()[:, 1].tolist() == [neuron]


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def routed(module: nn.Module, x: Tensor) -> Tensor:
    """Each expert's answer to one token, counted twice."""
    return module(x, torch.arange(len(x))[:, None].expand(-1, 2), ones(len(x), 2))


LLAMA4 = transformers.Llama4TextConfig(hidden_size=6, intermediate_size=4, num_local_experts=3)
LONGCAT = transformers.LongcatFlashConfig(
    hidden_size=6, expert_ffn_hidden_size=4, n_routed_experts=3, zero_expert_num=0
)
STEP = transformers.Step3p7TextConfig(hidden_size=6, moe_intermediate_size=4, n_routed_experts=3)
DBRX = transformers.models.dbrx.configuration_dbrx.DbrxFFNConfig(
    hidden_size=6, ffn_hidden_size=4, moe_num_experts=3, moe_top_k=1
)
INKLING = inkling.InklingTextConfig(hidden_size=6, moe_intermediate_size=4, n_shared_experts=3)
GEMMA3 = transformers.Gemma3Config(
    text_config={"hidden_size": 6, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4},
    vision_config={"hidden_size": 4, "image_size": 4, "patch_size": 2},
    mm_tokens_per_image=1,
)

MATRICES = {
    "mixtral": (lambda: MixtralExperts(ROUTED), "down_proj", lambda m: routed(m, ones(3, 6))),
    "gpt-oss": (lambda: GptOssExperts(FUSED), "down_proj", lambda m: routed(m, ones(3, 6))),
    "llama4": (lambda: llama4.Llama4TextExperts(LLAMA4), "down_proj", lambda m: m(ones(3, 6))),
    "longcat-flash": (
        lambda: longcat_flash.LongcatFlashExperts(LONGCAT),
        "down_proj",
        lambda m: routed(m, ones(3, 6)),
    ),
    "step3p7": (lambda: step3p7.Step3p7Experts(STEP), "down_proj", lambda m: routed(m, ones(3, 6))),
    "inkling": (lambda: inkling.InklingSharedExperts(INKLING), "down_proj", lambda m: m(ones(3, 6), torch.eye(3))),
    "jetmoe": (lambda: jetmoe.JetMoeParallelExperts(3, 4, 6), "weight", lambda m: m(ones(3, 4), [1, 1, 1])),
    "dbrx": (lambda: dbrx.DbrxExperts(DBRX), "mlp.w2", lambda m: routed(m, ones(3, 1, 6))),
    "gemma3": (
        lambda: gemma3.Gemma3MultiModalProjector(GEMMA3),
        "mm_input_projection_weight",
        lambda m: m(ones(1, 4, 4)),
    ),
    "convbert": (
        lambda: convbert.GroupedLinearLayer(12, 18, 3),
        "weight",
        lambda m: m(ones(1, 1, 12)).view(3, 6),
    ),
    "csm": (
        lambda: csm.CsmCodebooksHead(4, 4, 6),
        "weight",
        lambda m: m(ones(1, 3, 4), torch.arange(1, 4))[0],
    ),
    "moshi": (lambda: moshi.MoshiFlexibleLinear(4, 6, 3), "weight", lambda m: m(ones(1, 3, 4))[0]),
    "kyutai": (
        lambda: kyutai_speech_to_text.KyutaiSpeechToTextFlexibleLinear(4, 6, 3),
        "weight",
        lambda m: m(ones(1, 3, 4))[0],
    ),
}


@pytest.mark.parametrize("name", MATRICES)
def test_an_output_unit_of_a_raw_matrix_answers_to_its_neuron(name: str) -> None:
    build, parameter, answer = MATRICES[name]
    module = build().eval()
    for key, values in module.named_parameters():
        nn.init.constant_(values, 0 if "bias" in key else 0.5)
    owner = module.get_submodule(parameter.rpartition(".")[0])
    attribute = parameter.rpartition(".")[2]
    weight = getattr(owner, attribute)
    axis = neuron_axis(owner, attribute, tuple(weight.shape))
    layout = axis.layout(tuple(weight.shape))
    for neuron in range(layout.rows):
        weight.data = only_neuron(layout, tuple(weight.shape), neuron)
        with torch.no_grad():
            assert answer(module).flatten().nonzero().flatten().tolist() == [neuron]


@pytest.mark.parametrize("name", FAMILIES)
def test_linear_are_the_layers_that_are_applied_to_vectors_but_heads_of_tokens(name: str) -> None:
    skeleton = Skeleton(FAMILIES[name].base_class, FAMILIES[name].config)
    head = skeleton.model.get_output_embeddings()
    for owner, module in skeleton.model.named_modules():
        if type(module) in (nn.Linear, Conv1D, nn.Embedding, nn.Conv2d) and skeleton.neuron_axis(f"{owner}.weight"):
            linear = isinstance(module, nn.Linear | Conv1D) and module is not head
            assert skeleton.neuron_axis(f"{owner}.weight").linear == linear, owner


def test_every_expert_of_a_mixture_has_its_matrix() -> None:
    rows = NeuronAxis(1, fused=True, linear=True).layout((3, 4, 6))
    columns = NeuronAxis(2, fused=True, linear=True).layout((3, 6, 4))
    assert [(block.start, block.stop) for block in rows.matrices()] == [(0, 4), (4, 8), (8, 12)]
    assert [(block.batch, block.start, block.stop) for block in columns.matrices()] == [(e, 0, 4) for e in range(3)]


def test_a_batch_of_matrices_of_an_unknown_class_is_refused() -> None:
    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 4, 5))

    with pytest.raises(MergeError, match=r"weight of Unknown is a batch of matrices.*exclude="):
        neuron_axis(Unknown(), "weight", (3, 4, 5))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_neurons_of_whole_models_are_those_that_the_reference_is_told(name: str) -> None:
    family = FAMILIES[name]
    skeleton = Skeleton(family.base_class, family.config)
    parameters = {parameter: torch.empty(shape) for parameter, shape in skeleton.shapes.items()}
    for parameter, neurons in family.neurons_of(parameters).items():
        axis = skeleton.neuron_axis(parameter)
        if axis is None or neurons is None:
            assert axis is neurons is None, parameter
        else:
            assert neurons == Neurons((0, axis.axis) if axis.fused else (axis.axis,)), parameter


# Names


@pytest.mark.parametrize("name", FAMILIES)
def test_every_stored_tensor_has_its_own_place(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    base = Relatives(name, tmp_path).base
    skeleton = Skeleton(family.base_class, family.config)
    with safe_open(base / "model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    refs = skeleton.refs(shapes)
    assert len(set(refs.values())) == len(refs)
    named = {ref.parameter for ref in refs.values()}
    assert named == {skeleton.ties.get(parameter, parameter) for parameter in skeleton.shapes}
    for key, ref in refs.items():
        if ref.piece is None:
            assert skeleton.shapes[ref.parameter] == shapes[key]


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "vit", "mixtral"])
def test_unknown_names_have_no_place(name: str) -> None:
    skeleton = Skeleton(FAMILIES[name].base_class, FAMILIES[name].config)
    assert skeleton.refs(["no.such.weight", "weight"]) == {"no.such.weight": None, "weight": None}


def test_places_do_not_depend_on_a_prefix() -> None:
    config = FAMILIES["bert"].config
    bare = Skeleton(transformers.BertModel, config)
    headed = Skeleton(transformers.BertForSequenceClassification, config)
    name = "encoder.layer.0.output.LayerNorm.weight"
    old = name.replace("weight", "gamma")
    for skeleton, parameter in ((bare, name), (headed, f"bert.{name}")):
        spelled = [name, f"bert.{name}", old, f"bert.{old}"]
        assert {ref and ref.parameter for ref in skeleton.refs(spelled).values()} == {parameter}


def test_experts_stored_one_by_one_have_rows_as_neurons() -> None:
    skeleton = Skeleton(FAMILIES["mixtral"].base_class, FAMILIES["mixtral"].config)
    shapes = {
        f"model.layers.1.block_sparse_moe.experts.{e}.{w}.weight": (16, 12) if w == "w2" else (12, 16)
        for e in range(3)
        for w in ("w1", "w2", "w3")
    }
    refs = skeleton.refs(shapes)
    assert {ref.parameter.rpartition(".")[2] for ref in refs.values()} == {"gate_up_proj", "down_proj"}
    layouts, unknown = skeleton.stored_layouts({name: (refs[name], shape) for name, shape in shapes.items()})
    assert not unknown
    assert layouts == {name: replace(Layout.of(shape, 0), matrix=shape[0]) for name, shape in shapes.items()}


def test_ties_name_the_first_parameter() -> None:
    t5 = Skeleton(FAMILIES["t5"].base_class, FAMILIES["t5"].config)
    assert t5.ties == dict.fromkeys(
        ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"], "shared.weight"
    )
    assert Skeleton(FAMILIES["llama"].base_class, FAMILIES["llama"].config).ties == {}


def test_a_head_is_what_is_outside_the_backbone() -> None:
    headed = Skeleton(transformers.BertForSequenceClassification, FAMILIES["bert"].config)
    assert [name for name in headed.shapes if headed.is_head(name)] == ["classifier.weight", "classifier.bias"]
    bare = Skeleton(transformers.BertModel, FAMILIES["bert"].config)
    assert not any(bare.is_head(name) for name in bare.shapes)


def test_a_skeleton_takes_no_memory_and_leaves_its_configuration_alone() -> None:
    config = transformers.LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80)
    before = config.to_dict()
    skeleton = Skeleton(transformers.LlamaForCausalLM, config)
    assert {parameter.device.type for parameter in skeleton.model.parameters()} == {"meta"}
    assert config.to_dict() == before
    assert not skeleton.model.training
