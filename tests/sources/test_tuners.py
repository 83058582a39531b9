"""Every PEFT adapter that is a change of weights gives its own model back; every other is refused with its reason.

What is merged is compared with the unmerged PeftModel: PEFT's own merge_and_unload is wrong where embeddings are tied.
"""

import functools
import json
import shutil
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file

from families import FAMILIES, Relatives, assert_merged_as_reference, state
from neuromerge_hf import MergeError, MergeReport, NeuroMergingConfig, merge, plan_merge
from tiny_models import disturb, load, load_adapted, logits, save_fine_tune, save_llama, seeded

GIVES_BACK = NeuroMergingConfig(density=1, lambda_parallel=1, lambda_orthogonal=1)
"""Settings with which one expert is given back unchanged."""

CPU = {"device": "cpu", "threads": 1}

TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}


@dataclass(frozen=True)
class Variant:
    """An adapter to be made: of which base, and the options of its configuration besides the usual targets."""

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
"""Every type of adapter but LoRA that is a change of weights."""

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
"""LoRA with the options that change what it does."""

NEEDS = {"loftq": "bitsandbytes"}
"""Initialisations that need a package with which they quantise the base."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama of one layer with biases, the same with tied embeddings, and models of other families."""
    root = tmp_path_factory.mktemp("bases")
    found = {name: Relatives(name, root / name).base for name in ("gpt2", "mixtral", "gpt-oss") if name in FAMILIES}
    for name, tied in (("llama", False), ("tied", True)):
        plain = save_llama(
            root / f"plain-{name}", num_hidden_layers=1, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied
        )
        found[name] = save_fine_tune(plain, root / name, seed=1)
    return found


def config_of(kind: str, variant: Variant) -> PeftConfig:
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    settings = {"r": 4, "lora_alpha": 6} if kind == "LORA" else {}
    targets = {} if "target_parameters" in variant.options else TARGETS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return config_class(**(settings | targets | variant.options))


def save_tuned(base: Path, folder: Path, config: PeftConfig, seed: int = 5) -> Path:
    """An adapter none of whose parameters is as it was made."""
    with seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(load(base, dtype="float32"), config)
        disturb(adapted, trainable_only=True, scale=0.1)
        adapted.save_pretrained(folder)
    return folder


def merged_as_its_own_model(base: Path, adapter: Path, folder: Path) -> tuple[float, MergeReport]:
    """The largest difference between the logits of a merge of one adapter and those of its PeftModel."""
    report = merge([adapter], folder, base_model=base, config=GIVES_BACK, **CPU)
    want = logits(adapted(base, adapter))
    assert (want - logits_of(base)).abs().max() > 1e-3
    return float((logits(load(folder)) - want).abs().max()), report


@functools.lru_cache(1)
def adapted(base: Path, adapter: Path) -> PeftModel:
    """The model of an adapter in float32, as PEFT loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_adapted(base, adapter, dtype="float32")


@functools.cache
def logits_of(base: Path) -> torch.Tensor:
    return logits(load(base))


@functools.cache
def state_of(base: Path) -> dict[str, torch.Tensor]:
    return state(load(base, dtype="float32"))


def changed_state(base: Path, expert: Path) -> dict[str, torch.Tensor]:
    """The parameters that an expert changes, as transformers loads them or PEFT merges them."""
    if not (expert / "adapter_config.json").exists():
        return state(load(expert))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        new = state(adapted(base, expert).merge_and_unload())
    adapted.cache_clear()
    return {name: new[name] for name, tensor in state_of(base).items() if not torch.equal(new[name], tensor)}


# The invariant


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        *(pytest.param(kind, variant, id=kind) for kind, variant in TUNERS.items()),
        *(pytest.param("LORA", variant, id=f"LORA {name}") for name, variant in LORA.items()),
    ],
)
def test_an_adapter_is_given_back(
    kind: str, variant: Variant, bases: dict[str, Path], tmp_path: Path, record_property
) -> None:
    base = bases[variant.base]
    adapter = save_tuned(base, tmp_path / "adapter", config_of(kind, variant))
    error, report = merged_as_its_own_model(base, adapter, tmp_path / "merged")
    record_property("logit_error", error)
    assert error < 1e-4
    assert set(report.merged) == changed_state(base, adapter).keys()


@pytest.mark.parametrize("initialisation", NEEDS)
def test_an_adapter_whose_initialisation_needs_a_package_is_given_back(
    initialisation: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip(NEEDS[initialisation], reason=f"PEFT needs {NEEDS[initialisation]} for {initialisation}")
    config = config_of("LORA", on("llama", init_lora_weights=initialisation, loftq_config=peft.LoftQConfig()))
    adapter = save_tuned(bases["llama"], tmp_path / "adapter", config)
    error, _ = merged_as_its_own_model(bases["llama"], adapter, tmp_path / "merged")
    assert error < 1e-4


# Tied embeddings


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
"""Adapters that make two matrices of one."""


@pytest.mark.parametrize("name", TIED)
def test_an_adapter_that_unties_embeddings_is_given_back_untied(
    name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["tied"]
    adapter = save_tuned(base, tmp_path / "adapter", TIED[name])
    error, _ = merged_as_its_own_model(base, adapter, tmp_path / "merged")
    assert error < 1e-4
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


STILL_TIED = {
    "trained tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[2, 7]),
    "the same trained tokens": LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [2, 7], "lm_head": [2, 7]}
    ),
    "trained tokens alone": peft.TrainableTokensConfig(token_indices=[2, 7], target_modules=["embed_tokens"]),
}


@pytest.mark.parametrize("name", STILL_TIED)
def test_new_tokens_of_tied_embeddings_leave_them_tied(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["tied"]
    adapter = save_tuned(base, tmp_path / "adapter", STILL_TIED[name])
    error, report = merged_as_its_own_model(base, adapter, tmp_path / "merged")
    assert error < 1e-4
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "model.embed_tokens.weight" in report.merged


def test_tied_fine_tunes_count_for_both_matrices(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["tied"]
    adapter = save_tuned(base, tmp_path / "adapter", TIED["LoRA of the output embeddings"])
    full = save_fine_tune(base, tmp_path / "full", seed=7)
    tokens = save_tuned(base, tmp_path / "tokens", STILL_TIED["trained tokens"])
    stored = tmp_path / "stored"
    load_adapted(base, save_tuned(base, stored, TARGETS_ALONE)).save_pretrained(stored, save_embedding_layers=True)
    change_tensors(stored, change_embeddings)
    experts = [adapter, full, tokens, stored]
    config = NeuroMergingConfig(density=0.5, lambda_parallel=0.7, lambda_orthogonal=1.3)
    report = merge(experts, tmp_path / "merged", base_model=base, config=config, **CPU)

    def both(folder: Path) -> dict[str, torch.Tensor]:
        found = state(load(folder))
        return {**found, "lm_head.weight": found.get("lm_head.weight", found["model.embed_tokens.weight"])}

    theta = both(base)
    states = [changed_state(base, expert) for expert in experts]
    for tied in states[1:]:
        tied["lm_head.weight"] = tied["model.embed_tokens.weight"]
    embeddings = theta["lm_head.weight"] + effect_of_lora(adapter, "lm_head")
    states[0] = {"lm_head.weight": embeddings}
    neurons = Relatives("llama", tmp_path).family.neurons_of(theta)
    assert_merged_as_reference(both(tmp_path / "merged"), report, theta, states, neurons, exact_task_vectors=False)


TARGETS_ALONE = LoraConfig(r=4, target_modules=["q_proj"])


def effect_of_lora(adapter: Path, module: str) -> torch.Tensor:
    """The change that a LoRA adapter with PEFT's default alpha makes, from its factors."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
    return 8 / a.shape[0] * b @ a


def change_tensors(adapter: Path, change) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_an_untied_fine_tune_of_a_tied_base_is_given_back(bases: dict[str, Path], tmp_path: Path) -> None:
    model = load(bases["tied"])
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with seeded(3):
        disturb(model)
    model.save_pretrained(tmp_path / "untied")
    merge([tmp_path / "untied"], tmp_path / "merged", base_model=bases["tied"], config=GIVES_BACK, **CPU)
    merged = load(tmp_path / "merged")
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    torch.testing.assert_close(logits(merged), logits(model.eval()), rtol=1e-5, atol=1e-5)


def change_embeddings(tensors: dict[str, torch.Tensor]) -> None:
    for module in ("lm_head", "model.embed_tokens"):
        tensors[f"base_model.model.{module}.weight"][3, 5] += 1


def test_embeddings_that_an_adapter_stores_changed_stay_tied(bases: dict[str, Path], tmp_path: Path) -> None:
    base, adapter = bases["tied"], tmp_path / "adapter"
    load_adapted(base, save_tuned(base, adapter, TARGETS_ALONE)).save_pretrained(adapter, save_embedding_layers=True)
    change_tensors(adapter, change_embeddings)
    error, _ = merged_as_its_own_model(base, adapter, tmp_path / "merged")
    assert error < 1e-4
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True

    change_tensors(adapter, lambda tensors: tensors["base_model.model.lm_head.weight"].add_(1))
    with pytest.raises(MergeError, match=r"ties as two that differ, .*embed_tokens"):
        merge([adapter], tmp_path / "refused", base_model=base, **CPU)


def test_an_encoder_and_decoder_are_not_untied(tmp_path: Path) -> None:
    base = Relatives("t5", tmp_path).base
    with seeded(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(base)
        get_peft_model(model, LoraConfig(target_modules=["lm_head"], task_type="SEQ_2_SEQ_LM")).save_pretrained(
            tmp_path / "adapter"
        )
    with pytest.raises(MergeError, match=r"changes lm_head alone.*T5ForConditionalGeneration cannot be untied"):
        merge([tmp_path / "adapter"], tmp_path / "merged", base_model=base, **CPU)


# Several experts


def test_experts_of_mixed_kinds_are_merged_as_the_reference_does(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama"]
    experts = [
        save_tuned(base, tmp_path / "dora", config_of("LORA", LORA["DoRA with modules_to_save"]), seed=1),
        save_fine_tune(base, tmp_path / "full", seed=2),
        save_tuned(base, tmp_path / "ia3", config_of("IA3", TUNERS["IA3"]), seed=3),
        save_tuned(base, tmp_path / "vera", config_of("VERA", TUNERS["VERA"]), seed=4),
        save_tuned(base, tmp_path / "lora", config_of("LORA", LORA["plain"]), seed=5),
    ]
    config = NeuroMergingConfig(density=0.4, lambda_parallel=0.7, lambda_orthogonal="auto")
    report = merge(experts, tmp_path / "merged", base_model=base, config=config, device="cpu", threads=2)
    theta = state_of(base)
    states = [changed_state(base, expert) for expert in experts]
    neurons = Relatives("llama", tmp_path).family.neurons_of(theta)
    merged = state(load(tmp_path / "merged"))
    assert_merged_as_reference(merged, report, theta, states, neurons, exact_task_vectors=False)
    assert [expert.kind for expert in report.experts] == ["LoRA use_dora", "full", "IA3", "VERA", "LoRA r=4"]


@pytest.mark.parametrize("name", ["target_parameters, both", "all-linear on Mixtral"])
def test_fused_experts_are_merged_as_the_reference_does(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    relatives = Relatives("mixtral", tmp_path)
    adapter = save_tuned(relatives.base, tmp_path / "adapter", config_of("LORA", LORA[name]))
    experts = [adapter, relatives.full(1)]
    report = merge(experts, tmp_path / "merged", base_model=relatives.base, **CPU)
    theta = relatives.base_state()
    states = [changed_state(relatives.base, expert) for expert in experts]
    neurons = relatives.family.neurons_of(theta)
    merged = relatives.base_state(tmp_path / "merged")
    assert_merged_as_reference(merged, report, theta, states, neurons, exact_task_vectors=False)


def test_a_computed_adapter_gives_the_same_bytes_each_time(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama"]
    adapters = [
        save_tuned(base, tmp_path / kind, config_of(kind, variant), seed=seed)
        for seed, (kind, variant) in enumerate([("LORA", LORA["pissa"]), ("FROD", TUNERS["FROD"])])
    ]
    random_state = torch.get_rng_state()
    for threads in (1, 2):
        merge(adapters, tmp_path / str(threads), base_model=base, device="cpu", threads=threads)
    assert torch.equal(torch.get_rng_state(), random_state)
    first, second = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in "12")
    assert first == second


def test_a_computed_adapter_in_a_bin_file_is_the_same_adapter(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama"]
    for kind, variant in (("LORA", LORA["DoRA"]), ("VERA", TUNERS["VERA"])):
        adapter = save_tuned(base, tmp_path / kind, config_of(kind, variant))
        copy = shutil.copytree(adapter, tmp_path / f"{kind}-bin")
        torch.save(load_file(copy / "adapter_model.safetensors"), copy / "adapter_model.bin")
        (copy / "adapter_model.safetensors").unlink()
        for folder in (adapter, copy):
            merge([folder], tmp_path / f"{folder.name}-merged", base_model=base, **CPU)
        want, got = (tmp_path / f"{folder.name}-merged" / "model.safetensors" for folder in (adapter, copy))
        assert got.read_bytes() == want.read_bytes()


# Refusals


def refused(adapter: Path, base: Path, folder: Path) -> str:
    """The message with which an adapter is refused; nothing is left behind."""
    with pytest.raises(MergeError) as caught:
        merge([adapter], folder / "merged", base_model=base, **CPU)
    assert not (folder / "merged").exists()
    assert str(adapter) in str(caught.value)
    return str(caught.value)


PROMPTS = {
    "CARTRIDGE": peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "CPT": peft.CPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "MULTITASK_PROMPT_TUNING": peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "P_TUNING": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "PREFIX_TUNING": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "PROMPT_TUNING": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}

REFUSED = {
    **{kind: (config, "adds to what the model reads") for kind, config in PROMPTS.items()},
    "ADAPTION_PROMPT": (
        peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1),
        "adds to what the attention layers read",
    ),
    "LILY": (peft.LilyConfig(**TARGETS), "mixes its matrices anew for each input"),
    "POLY": (peft.PolyConfig(**TARGETS), "mixes its parts by the task"),
    "SHADOW": (peft.ShadowConfig(), "runs a second model beside the base"),
    "XLORA": (peft.XLoraConfig(hidden_size=32, adapters={"one": "one"}), "mixes several adapters anew"),
}
"""Every type of adapter that is no change of weights, and what the refusal says."""


@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_that_is_no_change_of_weights_is_refused(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    config, reason = REFUSED[kind]
    config.save_pretrained(tmp_path / "adapter")
    message = refused(tmp_path / "adapter", bases["llama"], tmp_path)
    for words in (f"of type {kind}:", reason, "no change of the base's weights", "Leave it out"):
        assert words in message


def test_every_type_that_peft_registers_is_given_back_or_refused() -> None:
    registered = {kind.value for kind in PEFT_TYPE_TO_TUNER_MAPPING}
    assert registered == {"LORA", *TUNERS, *REFUSED}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alora_invocation_tokens": [1, 2]}, ["alora_invocation_tokens", "invocation tokens", "Leave it out"]),
        ({"arrow_config": peft.ArrowConfig()}, ["arrow_config", "chooses among several adapters", "Leave it out"]),
        ({"layer_replication": [[0, 2], [1, 2]]}, ["layer_replication", "more layers", "Leave it out"]),
        ({"use_qalora": True}, ["use_qalora", "quantised layers", "Leave it out"]),
        ({"init_lora_weights": "lora_ga"}, ["'lora_ga'", "path_initial_model_for_weight_conversion"]),
        ({"init_lora_weights": "corda"}, ["'corda'", "path_initial_model_for_weight_conversion"]),
    ],
)
def test_a_lora_adapter_that_is_no_change_of_weights_is_refused(
    options: dict[str, Any], words: list[str], bases: dict[str, Path], tmp_path: Path
) -> None:
    config = LoraConfig(target_modules=["q_proj"])
    config.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    saved = {key: vars(value) if hasattr(value, "__dict__") else value for key, value in options.items()}
    file.write_text(json.dumps(json.loads(file.read_text()) | saved))
    message = refused(tmp_path / "adapter", bases["llama"], tmp_path)
    for word in words:
        assert word in message


def test_a_bias_that_the_base_lacks_is_not_added(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    for kind, options in (("LORA", {"lora_bias": True}), ("BEFT", {})):
        adapter = save_tuned(base, tmp_path / kind, config_of(kind, on("llama", **options)))
        assert "adds model.layers.0.mlp.down_proj.bias, which the base" in refused(adapter, base, tmp_path)


def test_a_computed_adapter_of_other_modules_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_tuned(bases["gpt2"], tmp_path / "adapter", config_of("LORA", LORA["DoRA of Conv1D"]))
    message = refused(adapter, bases["llama"], tmp_path)
    assert "h.0.attn.c_attn, which the base" in message
    assert "does not have" in message


def test_a_computed_adapter_of_another_size_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    wider = save_llama(tmp_path / "wider", num_hidden_layers=1, hidden_size=64)
    for kind in ("IA3", "VERA"):
        adapter = save_tuned(wider, tmp_path / kind, config_of(kind, TUNERS[kind]))
        message = refused(adapter, bases["llama"], tmp_path)
        assert "PEFT cannot merge" in message
        assert "check base_model" in message


def test_a_computed_adapter_that_is_not_finite_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("LOHA", "VERA"):
        adapter = save_tuned(bases["llama"], tmp_path / kind, config_of(kind, TUNERS[kind]))
        change_tensors(adapter, lambda tensors: next(iter(tensors.values())).fill_(torch.nan))
        assert "NaN" in refused(adapter, bases["llama"], tmp_path)


def test_half_a_computed_adapter_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    for kind, end in (("LOHA", "v_proj.hada_w1_a"), ("VERA", "v_proj.vera_lambda_b")):
        adapter = save_tuned(bases["llama"], tmp_path / kind, config_of(kind, TUNERS[kind]))
        change_tensors(adapter, lambda tensors, end=end: tensors.pop(next(key for key in tensors if key.endswith(end))))
        message = refused(adapter, bases["llama"], tmp_path)
        assert "missing" in message
        assert end in message


def test_a_tensor_that_is_not_known_of_its_type_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_tuned(bases["llama"], tmp_path / "adapter", config_of("LOHA", TUNERS["LOHA"]))
    key = "base_model.model.model.layers.0.self_attn.q_proj.gate"
    change_tensors(adapter, lambda tensors: tensors.update({key: torch.ones(3)}))
    message = refused(adapter, bases["llama"], tmp_path)
    assert "q_proj.gate, which is neither a parameter" in message
    assert "of type LOHA" in message


# Quantised bases


def test_an_adapter_of_a_quantised_base_merges_into_the_full_one_and_the_report_says_so(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    quantised = shutil.copytree(bases["llama"], tmp_path / "quantised")
    file = quantised / "config.json"
    method = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    file.write_text(json.dumps(json.loads(file.read_text()) | method))
    adapter = save_tuned(bases["llama"], tmp_path / "adapter", config_of("LORA", LORA["plain"]))
    file = adapter / "adapter_config.json"
    named = {"base_model_name_or_path": str(quantised)}
    file.write_text(json.dumps(json.loads(file.read_text()) | named))

    error, report = merged_as_its_own_model(bases["llama"], adapter, tmp_path / "full")
    assert error < 1e-4
    (note,) = report.notes
    for words in (adapter.name, quantised.name, "quantised (bitsandbytes)", bases["llama"].name):
        assert words in note
    assert str(tmp_path) not in note, "it goes into the card"
    assert note in str(report)
    assert note in str(plan_merge([adapter], base_model=bases["llama"]))

    with pytest.raises(MergeError, match=r"quantised \(bitsandbytes\).*base_model="):
        merge([adapter], tmp_path / "merged", **CPU)


def test_an_option_that_only_a_newer_peft_knows_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_tuned(bases["llama"], tmp_path / "adapter", TARGETS_ALONE)
    file = adapter / "adapter_config.json"
    known = json.loads(file.read_text())
    file.write_text(json.dumps(known | {"peft_version": "99.0", "use_magic": True, "use_other": False}))
    message = refused(adapter, bases["llama"], tmp_path)
    assert "use_magic, which PEFT" in message
    assert "pip install -U peft" in message
    file.write_text(json.dumps(known | {"peft_version": "99.0", "use_other": False}))
    merge([adapter], tmp_path / "merged", base_model=bases["llama"], **CPU)


def test_an_adapter_that_needs_a_package_which_is_not_installed_is_refused(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_tuned(bases["llama"], tmp_path / "adapter", config_of("ADAMSS", TUNERS["ADAMSS"]))
    monkeypatch.setitem(sys.modules, "sklearn", None)  # as if it were not there
    message = refused(adapter, bases["llama"], tmp_path)
    assert "adapter_config.json needs a package that is not installed here" in message
    assert "pip install scikit-learn" in message


# What training leaves behind


def test_an_adalora_whose_ranks_were_allocated_is_given_back(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama"]
    options = {"init_r": 6, "target_r": 2, "total_step": 6, "tinit": 1, "tfinal": 1, "deltaT": 1, "lora_alpha": 6}
    with seeded(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load(base), config_of("ADALORA", on("llama", **options)))
        disturb(model, trainable_only=True, scale=0.1)
        for step in range(1, 7):
            logits_of_training = model(input_ids=torch.arange(1, 13).view(2, 6)).logits
            logits_of_training.square().mean().backward()
            model.base_model.update_and_allocate(step)
        model.save_pretrained(tmp_path / "adapter")
    ranks = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    assert {sum(kept) for kept in ranks.values()} - {6}
    error, _ = merged_as_its_own_model(base, tmp_path / "adapter", tmp_path / "merged")
    assert error < 1e-4


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, use_dora=True, target_modules=["query", "dense"], task_type="SEQ_CLS"),
        peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[], task_type="SEQ_CLS"),
        peft.VeraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_a_computed_adapter_of_a_bare_base_keeps_its_head(config: PeftConfig, tmp_path: Path) -> None:
    relatives = Relatives("bert", tmp_path)
    adapter = tmp_path / "adapter"
    with seeded(2):
        model = get_peft_model(relatives.untrained(1), config)
        disturb(model, trainable_only=True, scale=0.1)
        model.save_pretrained(adapter)
    merge([adapter], tmp_path / "merged", base_model=relatives.base, config=GIVES_BACK, **CPU)
    merged = relatives.untrained(1, tmp_path / "merged")
    head = load_file(tmp_path / "merged" / "heads" / "adapter" / "head.safetensors")
    assert not merged.load_state_dict(head, strict=False).unexpected_keys
    assert head.keys() == {"classifier.weight", "classifier.bias"}
    want = relatives.output(relatives.trained(adapter, 1))
    assert (want - relatives.output(relatives.untrained(1))).abs().max() > 1e-3
    assert (relatives.output(merged.eval()) - want).abs().max() < 1e-4
