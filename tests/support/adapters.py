"""Adapters of every type that PEFT has, saved by PEFT, and the logits of their models."""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from torch import Tensor

from changes import change_tensors
from families import CPU, GIVES_BACK, state
from neuromerge_hf import MergeReport, merge
from tiny_models import disturb, load, load_adapted, logits, seeded

TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"]}


@dataclass(frozen=True)
class Variant:
    """The settings of an adapter.

    Attributes:
        base: The name of its base.
        options: The options of its configuration besides the usual targets.
    """

    base: str = "llama"
    options: dict[str, Any] = field(default_factory=dict)


def on(base: str, **options: Any) -> Variant:
    return Variant(base, options)


TUNERS = {
    "ADALORA": on("llama", total_step=10, init_r=4, target_r=2),
    "ADAMSS": on("llama", target_modules=["q_proj"], r=8, num_subspaces=2),
    "BEFT": on("llama"),
    "BOFT": on("llama", boft_block_size=4),
    "C3A": on("llama", block_size=8),
    "DEFT": on("llama"),
    "DELORA": on("llama"),
    "FOURIERFT": on("llama", n_frequency=20),
    "FROD": on("llama"),
    "GLORA": on("llama", r=4),
    "GRALORA": on("llama"),
    "HIRA": on("llama"),
    "HRA": on("llama", r=4),
    "IA3": on("llama", feedforward_modules=["down_proj"]),
    "LN_TUNING": on("llama", target_modules=["input_layernorm", "norm"]),
    "LOHA": on("llama", rank_pattern={"q_proj": 3}),
    "LOKR": on("llama", alpha_pattern={"v_proj": 3}),
    "MISS": on("llama", r=8),
    "OFT": on("llama", oft_block_size=4),
    "OSF": on("llama"),
    "PEANUT": on("llama"),
    "PSOFT": on("llama", r=4),
    "PVERA": on("llama"),
    "RANDLORA": on("llama"),
    "ROAD": on("llama", group_size=8),
    "SHIRA": on("llama", r=2),
    "SUPERTUNING": on("llama", sparsity=0.9),
    "TINYLORA": on("llama"),
    "TRAINABLE_TOKENS": on("llama", target_modules=["embed_tokens"], token_indices=[1, 3, 5]),
    "UNILORA": on("llama"),
    "VBLORA": on("llama", vector_length=4, num_vectors=16, topk=2, r=2),
    "VERA": on("llama"),
    "WAVEFT": on("llama", n_frequency=20),
}
"""Every type of adapter that modifies weights, except LoRA."""

LORA = {
    "plain": on("llama"),
    "rslora": on("llama", use_rslora=True, rank_pattern={"q_proj": 5}),
    "DoRA": on("llama", use_dora=True),
    "DoRA with rslora and patterns": on("llama", use_dora=True, use_rslora=True, rank_pattern={"q_proj": 5}),
    "DoRA of Conv1D": on("gpt2", use_dora=True, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "DoRA of an embedding": on("llama", use_dora=True, target_modules=["embed_tokens", "q_proj"]),
    "DoRA with bias=all": on("llama", use_dora=True, bias="all"),
    "DoRA with modules_to_save": on("llama", use_dora=True, modules_to_save=["norm", "lm_head"]),
    "lora_bias": on("llama", lora_bias=True),
    "lora_bias with bias=all": on("llama", lora_bias=True, bias="all"),
    "target_parameters": on("mixtral", target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"]),
    "target_parameters, both": on("mixtral", target_parameters=["mlp.experts.gate_up_proj", "experts.down_proj"]),
    "target_parameters, transposed": on("gpt-oss", target_parameters=["experts.gate_up_proj"]),
    "target_parameters of Linear": on("llama", target_modules=[], target_parameters=["q_proj.weight"]),
    "all-linear on Mixtral": on("mixtral", target_modules="all-linear"),
    "trainable tokens": on("llama", trainable_token_indices=[2, 7]),
    "trainable tokens of two": on("llama", trainable_token_indices={"embed_tokens": [2, 7], "lm_head": [3]}),
    "DoRA with trainable tokens": on("llama", use_dora=True, trainable_token_indices=[2, 7]),
    "pissa": on("llama", init_lora_weights="pissa"),
    "pissa with rslora": on("llama", init_lora_weights="pissa", use_rslora=True),
    "pissa of Conv1D": on("gpt2", init_lora_weights="pissa", target_modules=["c_attn"], fan_in_fan_out=True),
    "olora": on("llama", init_lora_weights="olora"),
    "gaussian": on("llama", init_lora_weights="gaussian"),
    "orthogonal": on("llama", init_lora_weights="orthogonal"),
    "eva": on("llama", init_lora_weights="eva"),
    "mica": on("llama", init_lora_weights="mica"),
    "velora": on("llama", velora_config=VeloraConfig(num_groups=4)),
    "monteclora": on("llama", monteclora_config=MontecloraConfig()),
    "kasa": on("llama", kasa_config=KasaConfig()),
    "bdlora": on(
        "llama",
        target_modules=["q_proj", "down_proj"],
        use_bdlora=BdLoraConfig(target_modules_bd_b=["q_proj"], target_modules_bd_a=["down_proj"], nblocks=2),
    ),
}
"""LoRA with each of the options that change its effect."""

NEEDS = {"loftq": "bitsandbytes"}
"""Initialisations that need another package, with which they quantise the base."""


def config_of(kind: str, variant: Variant) -> PeftConfig:
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    settings = {"r": 4, "lora_alpha": 6} if kind == "LORA" else {}
    targets = {} if "target_parameters" in variant.options else TARGETS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return config_class(**(settings | targets | variant.options))


def save_tuned(base: Path, folder: Path, config: PeftConfig, seed: int = 5) -> Path:
    """Save an adapter, after adding noise to all of its parameters."""
    with seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(load(base, dtype="float32"), config)
        disturb(adapted, trainable_only=True, scale=0.1)
        adapted.save_pretrained(str(folder))
    return folder


def merged_as_its_own_model(base: Path, adapter: Path, folder: Path) -> tuple[float, MergeReport]:
    """Merge one adapter. Return the largest difference between its logits and its PeftModel's, and the report."""
    report = merge([adapter], folder, base_model=base, config=GIVES_BACK, **CPU)
    want = logits(adapted(base, adapter))
    assert (want - logits_of(base)).abs().max() > 1e-3
    return float((logits(load(folder)) - want).abs().max()), report


@functools.lru_cache(1)
def adapted(base: Path, adapter: Path) -> PeftModel:
    """Load the model of an adapter in float32 with PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_adapted(base, adapter, dtype="float32")


@functools.cache
def logits_of(base: Path) -> Tensor:
    return logits(load(base))


@functools.cache
def state_of(base: Path) -> dict[str, Tensor]:
    return state(load(base, dtype="float32"))


def changed_state(base: Path, expert: Path) -> dict[str, Tensor]:
    """The parameters that an expert changes, as transformers loads them or PEFT merges them."""
    if not (expert / "adapter_config.json").exists():
        return state(load(expert))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        new = state(adapted(base, expert).merge_and_unload())
    adapted.cache_clear()
    return {name: new[name] for name, tensor in state_of(base).items() if not torch.equal(new[name], tensor)}


TIED = {
    "LoRA of the input embeddings": LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "LoRA of the output embeddings": LoraConfig(r=4, target_modules=["lm_head"]),
    "LoRA of both": LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]),
    "LoRA of both, tied": LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True),
    "DoRA of the input embeddings": LoraConfig(r=4, target_modules=["embed_tokens"], use_dora=True),
    "input embeddings saved": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "output embeddings saved": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "both saved": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "OFT of the output embeddings": peft.OFTConfig(oft_block_size=4, target_modules=["lm_head", "q_proj"]),
    "LoHa of the output embeddings": peft.LoHaConfig(r=4, target_modules=["lm_head"]),
    "trained tokens of the output": LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices={"lm_head": [3]}
    ),
    "different trained tokens": LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [2, 7], "lm_head": [3]}
    ),
}
"""Adapters that untie the input and the output embeddings."""

STILL_TIED = {
    "trained tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[2, 7]),
    "the same trained tokens": LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [2, 7], "lm_head": [2, 7]}
    ),
    "trained tokens alone": peft.TrainableTokensConfig(token_indices=[2, 7], target_modules=["embed_tokens"]),
}
TARGETS_ALONE = LoraConfig(r=4, target_modules=["q_proj"])


def change_adapter(adapter: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of an adapter in their file."""
    change_tensors(adapter / "adapter_model.safetensors", change)
