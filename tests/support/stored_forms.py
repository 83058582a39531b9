"""Checkpoints that are changed by hand, so that they store their tensors under other names or in other forms."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor

from all_families import ALL_FAMILIES, SMALL, VISION_TOWER
from families import DECODER, ENCODER, TOKENS, Family, images, state

Tensors = dict[str, Tensor]


FAMILIES = ALL_FAMILIES | {
    "clip-vision": Family(transformers.CLIPVisionConfig(**VISION_TOWER), transformers.CLIPVisionModel, images(8), {}),
    "olmo-hybrid": Family(
        transformers.OlmoHybridConfig(
            **DECODER,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=4,
            linear_value_head_dim=8,
        ),
        transformers.OlmoHybridForCausalLM,
        TOKENS,
        {},
    ),
    "gte": Family(
        transformers.GteConfig(**ENCODER, vocab_size=40, max_position_embeddings=16),
        transformers.GteModel,
        TOKENS,
        {},
    ),
    "qwen3-vl-moe": Family(
        transformers.Qwen3VLMoeConfig(
            text_config={**SMALL, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 10},
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 12,
                "num_heads": 2,
                "out_hidden_size": 16,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [],
            },
        ),
        transformers.Qwen3VLMoeForConditionalGeneration,
        TOKENS,
        {},
    ),
}


def renamed(*patterns: tuple[str, str]) -> Callable[[Path, Tensors], Tensors]:
    """Return a function that stores the same tensors under other names."""

    def restore(folder: Path, tensors: Tensors) -> Tensors:
        for old, new in patterns:
            tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
        return tensors

    return restore


def as_in_memory(folder: Path, tensors: Tensors) -> Tensors:
    """The parameters with the names and shapes that they have in memory, as torch itself saves them."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return state(getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32))


def with_buffers(*names: str) -> Callable[[Path, Tensors], Tensors]:
    """Return a function that adds position ids, which old checkpoints store although they are no parameters."""
    return lambda folder, tensors: tensors | {name: torch.arange(16)[None] for name in names}


def with_tied_copies(**copies: str) -> Callable[[Path, Tensors], Tensors]:
    return lambda folder, tensors: (
        tensors | {f"{name}.weight": tensors[f"{owner}.weight"].clone() for name, owner in copies.items()}
    )


def transposed_experts(folder: Path, tensors: Tensors) -> Tensors:
    """The tensors with transposed experts, as in the published checkpoints of Qwen3-VL-MoE."""
    return {
        name: tensor.transpose(1, 2).contiguous() if ".mlp.experts." in name else tensor
        for name, tensor in tensors.items()
    }


GAMMA_AND_BETA = renamed((r"LayerNorm\.weight", "LayerNorm.gamma"), (r"LayerNorm\.bias", "LayerNorm.beta"))

CASES = {
    "old names of layer norms (gamma and beta)": ("bert", GAMMA_AND_BETA),
    "old names of layer norms, RoBERTa": ("roberta", GAMMA_AND_BETA),
    "no prefix, as GPT-2 itself is stored": ("gpt2", renamed((r"^transformer\.", ""))),
    "no prefix, but a head": ("llama", renamed((r"^model\.", ""))),
    "ViT's names of transformers 5": ("vit", as_in_memory),
    "a prefix that CLIP's vision model had": ("clip-vision", renamed((r"^", "vision_model."))),
    "Swin's names of transformers 5": ("swin", as_in_memory),
    "LLaVA's names of transformers 5": ("llava", as_in_memory),
    "weight_g and weight_v of a weight norm": (
        "wav2vec2",
        renamed(
            (r"parametrizations\.weight\.original0", "weight_g"), (r"parametrizations\.weight\.original1", "weight_v")
        ),
    ),
    "positions stored, BERT": ("bert", with_buffers("embeddings.position_ids")),
    "positions stored, CLIP": (
        "clip",
        with_buffers("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
    ),
    "a tied head stored as well": ("llama-tied", with_tied_copies(lm_head="model.embed_tokens")),
    "Mixtral's experts fused": ("mixtral", as_in_memory),
    "Qwen2-MoE's experts fused": ("qwen2-moe", as_in_memory),
    "Qwen3-MoE's experts fused": ("qwen3-moe", as_in_memory),
    "Qwen3-VL-MoE's experts transposed": ("qwen3-vl-moe", transposed_experts),
    "query, key and value apart (GTE)": ("gte", as_in_memory),
}
