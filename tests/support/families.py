"""One tiny model of each architecture that is stored or computed in its own way, with fine-tunes and LoRA adapters.

A family states the neurons of each parameter for the reference. The package has to find them by itself. All weights are
random, from fixed seeds, and saved by transformers and PEFT.
"""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import reference
from neuromerge_hf import MergeReport, NeuroMergingConfig
from reference import Neurons
from tiny_models import disturb, seeded

EPSILON = torch.finfo(torch.float32).eps

GIVES_BACK = NeuroMergingConfig(density=1, lambda_parallel=1, lambda_orthogonal=1)
"""Settings with which a merge of one expert returns that expert unchanged."""

CPU: dict[str, Any] = {"device": "cpu", "threads": 1}
"""The options of `Runtime` with which tiny models merge fastest."""


@dataclass(frozen=True)
class Family:
    """An architecture, with all that the tests need to know about it.

    Attributes:
        config: The base's configuration.
        base_class: The class that the base is saved as.
        inputs: Example arguments of `forward`.
        lora: Options of the adapters' LoraConfig.
        neurons: The axes that number the neurons of a parameter, by patterns of names. The default is dimension 0 for
            weights and None (no neurons) for vectors.
        fused: The number of matrices that a parameter of fused experts is stored as, by patterns of names.
        expert_class: The class that the experts are saved as; None for the base's.
        labels: The number of labels of each expert's own head, for an expert class with a head that the base lacks.
    """

    config: PretrainedConfig
    base_class: type[PreTrainedModel]
    inputs: dict[str, Tensor]
    lora: dict[str, Any]
    neurons: dict[str, Neurons | None] = field(default_factory=dict)
    fused: dict[str, int] = field(default_factory=dict)
    expert_class: type[PreTrainedModel] | None = None
    labels: tuple[int, ...] = ()

    def neurons_of(self, parameters: Mapping[str, Tensor]) -> dict[str, Neurons | None]:
        """The axes of the neurons of each parameter of a model, for the reference."""
        found = {}
        for name, tensor in parameters.items():
            default = reference.LINEAR if tensor.ndim >= 2 else None
            found[name] = next((n for pattern, n in self.neurons.items() if fnmatchcase(name, pattern)), default)
        return found

    def matrices_of(self, parameters: Collection[str]) -> dict[str, int]:
        """The parameters that hold matrices of linear layers, each with the number of its matrices."""
        with torch.device("meta"):
            model = self.base_class(self.config)
        linear = {
            f"{name}.weight": 1
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D) and module is not model.get_output_embeddings()
        }
        fused = {name: n for name in parameters for pattern, n in self.fused.items() if fnmatchcase(name, pattern)}
        return {name: count for name, count in (linear | fused).items() if name in parameters}


TOKENS = {"input_ids": torch.arange(1, 13).view(2, 6)}
ENCODER_AND_DECODER = {"input_ids": TOKENS["input_ids"], "decoder_input_ids": torch.arange(3, 11).view(2, 4)}


def images(size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * size * size).sin().view(2, 3, size, size)}


DECODER: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ENCODER: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
ATTENTION: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}

LABELS: dict[str, Any] = {"num_labels": 3}
START: dict[str, Any] = {"decoder_start_token_id": 0}

FAMILIES = {
    "llama": Family(
        transformers.LlamaConfig(**DECODER, tie_word_embeddings=False), transformers.LlamaForCausalLM, TOKENS, CAUSAL
    ),
    "llama-tied": Family(
        transformers.LlamaConfig(**DECODER, tie_word_embeddings=True), transformers.LlamaForCausalLM, TOKENS, CAUSAL
    ),
    "bert": Family(
        transformers.BertConfig(**ENCODER, vocab_size=40, max_position_embeddings=16),
        transformers.BertModel,
        TOKENS,
        {"task_type": "SEQ_CLS", "target_modules": ["query", "dense"], "exclude_modules": [".*pooler.*"]},
        expert_class=transformers.BertForSequenceClassification,
        labels=(2, 3, 5),
    ),
    "t5": Family(
        transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, **START),
        transformers.T5ForConditionalGeneration,
        ENCODER_AND_DECODER,
        {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "v", "wi", "wo"]},
    ),
    "gpt2": Family(
        transformers.GPT2Config(
            vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
        ),
        transformers.GPT2LMHeadModel,
        TOKENS,
        {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        neurons=dict.fromkeys(("*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight"), reference.CONV1D),
    ),
    "vit": Family(
        transformers.ViTConfig(**ENCODER, image_size=8, patch_size=4, **LABELS),
        transformers.ViTForImageClassification,
        images(8),
        {"target_modules": ["q_proj", "v_proj", "projection"]},
        neurons={"*.cls_token": None, "*.position_embeddings": Neurons((1,))},
    ),
    "resnet": Family(
        transformers.ResNetConfig(embedding_size=6, hidden_sizes=[6, 8], depths=[1, 1], layer_type="basic", **LABELS),
        transformers.ResNetForImageClassification,
        images(16),
        {"target_modules": ["convolution"]},
    ),
    "dpt": Family(
        transformers.DPTConfig(
            hidden_size=16,
            intermediate_size=12,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[4, 6, 8, 8],
            fusion_hidden_size=4,
            is_hybrid=False,
            initializer_range=0.2,  # with the default, the output does not depend on the input
        ),
        transformers.DPTForDepthEstimation,
        images(16),
        {"target_modules": ["query", "dense", "projection"]},
        neurons={
            "*.cls_token": None,
            "*.position_embeddings": Neurons((1,)),
            "*.layers.0.resize.weight": reference.CONV_TRANSPOSE,
            "*.layers.1.resize.weight": reference.CONV_TRANSPOSE,
        },
    ),
    "mixtral": Family(
        transformers.MixtralConfig(**DECODER, num_local_experts=3),
        transformers.MixtralForCausalLM,
        TOKENS,
        ATTENTION,
        neurons={"*.experts.*_proj": reference.FUSED_EXPERTS},
        fused={"*.experts.gate_up_proj": 6, "*.experts.down_proj": 3},  # gate and up of each expert are stored apart
    ),
    "gpt-oss": Family(
        transformers.GptOssConfig(**DECODER, num_local_experts=3, num_experts_per_tok=2),
        transformers.GptOssForCausalLM,
        TOKENS,
        ATTENTION,
        neurons={"*.experts.*_proj": reference.FUSED_EXPERTS_TRANSPOSED, "*.experts.*_bias": None},
        fused={"*.experts.*_proj": 3},
    ),
}


class Relatives:
    """A family's base and experts in a folder. Each is made when it is first used. Experts are numbered from 0."""

    def __init__(self, name: str, folder: Path, families: Mapping[str, Family] = FAMILIES):
        self.family = families[name]
        self.folder = folder

    @property
    def expert_class(self) -> type[PreTrainedModel]:
        return self.family.expert_class or self.family.base_class

    @property
    def base(self) -> Path:
        folder = self.folder / "base"
        if not folder.exists():
            with seeded(0):
                model = self.family.base_class(self.family.config)
                disturb(model, scale=0.02)
            model.save_pretrained(folder)
        return folder

    def expert(self, kind: str, number: int) -> Path:
        """A full fine-tune or a LoRA adapter."""
        return self.full(number) if kind == "full" else self.adapter(number)

    def full(self, number: int) -> Path:
        """A full fine-tune, in which all parameters and buffers differ from the base's."""
        folder = self.folder / f"full-{number}"
        if not folder.exists():
            model = self.untrained(number)
            with seeded(100 + number), torch.no_grad():
                disturb(model)
                for buffer in model.buffers():
                    buffer += torch.rand_like(buffer) / 10 if buffer.is_floating_point() else 1
            model.save_pretrained(folder)
        return folder

    def adapter(self, number: int, folder: Path | None = None, **options: Any) -> Path:
        """A LoRA adapter without zero factors. An adapter with other `options` needs a folder of its own."""
        folder = folder or self.folder / f"adapter-{number}"
        if not folder.exists():
            with seeded(200 + number):
                settings = {"r": 3, "lora_alpha": 8, **self.family.lora, **options}
                model = get_peft_model(self.untrained(number), LoraConfig(**settings))
                disturb(model, trainable_only=True, scale=0.1)
            # PEFT warns that it also stores the embeddings that it adapts.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
                model.save_pretrained(str(folder))
        return folder

    def untrained(self, number: int, folder: Path | None = None) -> PreTrainedModel:
        """A model of an expert's class with the weights in `folder` (default: the base), and always the same head."""
        labels = self.family.labels
        with seeded(300 + number):
            return load(self.expert_class, folder or self.base, **({"num_labels": labels[number]} if labels else {}))

    def trained(self, expert: Path, number: int) -> torch.nn.Module:
        """An expert, as transformers or PEFT load it."""
        if (expert / "adapter_config.json").exists():
            return PeftModel.from_pretrained(self.untrained(number), expert).eval()
        return load(self.expert_class, expert)

    def load_cleanly(self, folder: Path) -> PreTrainedModel:
        """Load a merged model as the base's class, and assert that no weights are missing or unexpected."""
        return load_cleanly(self.family.base_class, folder, dtype=torch.float32)

    def base_state(self, folder: Path | None = None) -> dict[str, Tensor]:
        """The parameters and buffers of the base, or of a merged model."""
        return state(load(self.family.base_class, folder or self.base))

    def expert_state(self, expert: Path, number: int) -> dict[str, Tensor]:
        """The parameters and buffers that an expert may change, by their names in the base."""
        base = self.base_state()
        model: Any = self.trained(expert, number)
        is_adapter = isinstance(model, PeftModel)
        if is_adapter:
            model = model.merge_and_unload()
        theirs = state(model)
        prefix = f"{model.base_model_prefix}."
        renamed = {name if name in base else name.removeprefix(prefix): tensor for name, tensor in theirs.items()}
        return {
            name: tensor
            for name, tensor in renamed.items()
            if name in base and not (is_adapter and torch.equal(tensor, base[name]))
        }

    def experts_state(self, experts: Sequence[Path]) -> list[dict[str, Tensor]]:
        return [self.expert_state(expert, number) for number, expert in enumerate(experts)]

    def output(self, model: torch.nn.Module) -> Tensor:
        """The output of a model for the family's example inputs."""
        with torch.no_grad():
            answer: Tensor = model(**self.family.inputs, return_dict=False)[0]
            return answer


def load(model_class: type[PreTrainedModel], folder: Path, **changes: Any) -> PreTrainedModel:
    """Load a model in float32, whatever its stored dtype, so that PEFT does not round the weights that it merges."""
    model: PreTrainedModel = model_class.from_pretrained(folder, dtype=torch.float32, **changes)
    return model


def load_cleanly(model_class: type[PreTrainedModel], folder: Path, **options: Any) -> PreTrainedModel:
    """Load a model, and assert that no weights are missing or unexpected."""
    loaded: Any = model_class.from_pretrained(folder, output_loading_info=True, **options)
    model: PreTrainedModel = loaded[0]
    assert not any(loaded[1].values()), loaded[1]
    return model


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    """The persistent parameters and buffers of a model, each tied one once."""
    owners: dict[int, str] = {}
    named = model.state_dict(keep_vars=True).items()
    return {name: tensor.detach() for name, tensor in named if owners.setdefault(id(tensor), name) == name}


def assert_merged_as_reference(
    merged: Mapping[str, Tensor],
    report: MergeReport,
    base: dict[str, Tensor],
    experts: list[dict[str, Tensor]],
    neurons: dict[str, Neurons | None],
    *,
    exact_task_vectors: bool = True,
) -> None:
    """Assert that a merged model's float32 state is the reference's result with the report's settings.

    A neuron agrees when it differs by at most 1e-5 of its change plus one rounding of its own norm to float32.

    Args:
        exact_task_vectors: whether the experts' states determine the task vectors to the last bit. Those of a LoRA do
            not, because they are rounded when they are added to the base.
    """
    assert report.density is not None
    assert report.lambda_parallel is not None
    assert report.lambda_orthogonal is not None
    want, found = reference.merge_model(
        base, experts, neurons, report.density, report.lambda_parallel, report.lambda_orthogonal
    )
    thresholds = [expert.threshold for expert in report.experts]
    assert thresholds == (found["thresholds"] if exact_task_vectors else pytest.approx(found["thresholds"], rel=1e-5))
    assert [expert.sigma for expert in report.experts] == pytest.approx(found["sigma_t"], rel=1e-6, abs=1e-6)
    assert [expert.entries for expert in report.experts] == [
        sum(tensor.numel() for tensor in expert.values() if tensor.is_floating_point()) for expert in experts
    ]
    assert merged.keys() == want.keys()
    agreeing = total = 0
    for name, theta in want.items():
        if theta is base[name]:
            assert_same_bits(merged[name], theta, name)
            continue
        view = neurons[name] or Neurons(tuple(range(theta.ndim)))  # without neurons, each entry is compared alone
        goal, got, old = (view.to_rows(tensor.double()) for tensor in (theta, merged[name], base[name]))
        tolerance = 1e-5 * (goal - old).norm(dim=1) + EPSILON * goal.norm(dim=1)
        agree = (got - goal).norm(dim=1) <= tolerance
        assert neurons[name] or agree.all(), f"{name} differs from the reference"
        agreeing, total = agreeing + int(agree.sum()), total + len(agree)
    assert agreeing >= 0.999 * total, f"{total - agreeing} of {total} neurons differ from the reference"


def assert_same_bits(got: Tensor, want: Tensor, name: str = "") -> None:
    assert got.dtype == want.dtype, name
    assert got.shape == want.shape, name
    assert torch.equal(got.flatten().view(torch.uint8), want.flatten().view(torch.uint8)), f"{name} has other bits"
