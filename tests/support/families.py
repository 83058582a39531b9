"""One tiny model of each architecture that is stored or computed in its own way, with fine-tunes and LoRA adapters.

A family says what the reference needs to know and the package finds out by itself: what the neurons of each parameter
are. Everything is random, from fixed seeds, and saved by transformers and PEFT.
"""

import warnings
from collections.abc import Mapping, Sequence
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

import reference
from neuromerge_hf import MergeReport, NeuroMergingConfig
from reference import Neurons
from tiny_models import disturb, seeded

EPSILON = torch.finfo(torch.float32).eps

GIVES_BACK = NeuroMergingConfig(density=1, lambda_parallel=1, lambda_orthogonal=1)
"""Settings with which one expert is given back unchanged."""


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        config: of the base.
        base_class: what the base is saved as.
        inputs: an example for `forward`.
        lora: what its adapters target.
        neurons: which axes number the neurons of a parameter, by patterns of names; dimension 0 of all other weights.
        expert_class: what the experts are saved as, if not as the base.
        labels: how many each expert's own head has, for an expert class with a head that the base lacks.
    """

    config: PretrainedConfig
    base_class: type[PreTrainedModel]
    inputs: dict[str, Tensor]
    lora: dict[str, Any]
    neurons: dict[str, Neurons | None] = field(default_factory=dict)
    expert_class: type[PreTrainedModel] | None = None
    labels: tuple[int, ...] = ()

    def neurons_of(self, parameters: Mapping[str, Tensor]) -> dict[str, Neurons | None]:
        """What the reference is told about a model's parameters."""
        found = {}
        for name, tensor in parameters.items():
            default = reference.LINEAR if tensor.ndim >= 2 else None
            found[name] = next((n for pattern, n in self.neurons.items() if fnmatchcase(name, pattern)), default)
        return found


TOKENS = {"input_ids": torch.arange(1, 13).view(2, 6)}
ENCODER_AND_DECODER = {"input_ids": TOKENS["input_ids"], "decoder_input_ids": torch.arange(3, 11).view(2, 4)}


def images(size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * size * size).sin().view(2, 3, size, size)}


DECODER = {
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
ENCODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CAUSAL = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
ATTENTION = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}

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
        transformers.T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
        ),
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
        transformers.ViTConfig(**ENCODER, image_size=8, patch_size=4, num_labels=3),
        transformers.ViTForImageClassification,
        images(8),
        {"target_modules": ["q_proj", "v_proj", "projection"]},
        neurons={"*.cls_token": None, "*.position_embeddings": Neurons((1,))},
    ),
    "resnet": Family(
        transformers.ResNetConfig(
            embedding_size=6, hidden_sizes=[6, 8], depths=[1, 1], layer_type="basic", num_labels=3
        ),
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
            initializer_range=0.2,  # at the usual one its output does not depend on its input
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
    ),
    "gpt-oss": Family(
        transformers.GptOssConfig(**DECODER, num_local_experts=3, num_experts_per_tok=2),
        transformers.GptOssForCausalLM,
        TOKENS,
        ATTENTION,
        neurons={"*.experts.*_proj": reference.FUSED_EXPERTS_TRANSPOSED, "*.experts.*_bias": None},
    ),
}


class Relatives:
    """A family's base and experts in a folder, made when they are asked for. Experts are numbered from 0."""

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
        """A full fine-tune: all parameters are other ones, and so are the buffers."""
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
        """A LoRA adapter, none of whose factors is zero; one with other `options` needs a folder of its own."""
        folder = folder or self.folder / f"adapter-{number}"
        if not folder.exists():
            with seeded(200 + number):
                settings = {"r": 3, "lora_alpha": 8, **self.family.lora, **options}
                model = get_peft_model(self.untrained(number), LoraConfig(**settings))
                disturb(model, trainable_only=True, scale=0.1)
            # PEFT warns that it also stores the embeddings that it adapts.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
                model.save_pretrained(folder)
        return folder

    def untrained(self, number: int, folder: Path | None = None) -> PreTrainedModel:
        """The model of an expert's class with a base's weights (default: the base's); the head is always the same."""
        labels = self.family.labels
        with seeded(300 + number):
            return load(self.expert_class, folder or self.base, **({"num_labels": labels[number]} if labels else {}))

    def trained(self, expert: Path, number: int) -> torch.nn.Module:
        """An expert, as transformers or PEFT load it."""
        if (expert / "adapter_config.json").exists():
            return PeftModel.from_pretrained(self.untrained(number), expert).eval()
        return load(self.expert_class, expert)

    def load_cleanly(self, folder: Path) -> PreTrainedModel:
        """A merged model as the base's class, which finds just what it needs."""
        model, info = self.family.base_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(info.values()), info
        return model

    def base_state(self, folder: Path | None = None) -> dict[str, Tensor]:
        """The parameters and buffers of the base, or of a merged model."""
        return state(load(self.family.base_class, folder or self.base))

    def expert_state(self, expert: Path, number: int) -> dict[str, Tensor]:
        """The parameters and buffers that an expert may change, by their names in the base."""
        base = self.base_state()
        model = self.trained(expert, number)
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
        """What a model answers to the family's example."""
        with torch.no_grad():
            return model(**self.family.inputs, return_dict=False)[0]


def load(model_class: type[PreTrainedModel], folder: Path, **changes: Any) -> PreTrainedModel:
    """A model in float32, whatever it is stored in, so that PEFT does not round what it adds to it."""
    model: PreTrainedModel = model_class.from_pretrained(folder, dtype=torch.float32, **changes)
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
    """A merged model's float32 state is the one that the reference makes with the report's settings.

    A neuron agrees when it differs by at most 1e-5 of its change plus one rounding of its own norm to float32.

    Args:
        exact_task_vectors: whether the experts' states determine the task vectors to the last bit; those of a LoRA are
            rounded when they are added to the base.
    """
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
        view = neurons[name] or Neurons(tuple(range(theta.ndim)))  # each entry of the others is compared alone
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
