"""Every PEFT adapter that is no change of weights, or is damaged, is refused with its reason."""

import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from adapters import (
    LORA,
    TARGETS,
    TARGETS_ALONE,
    TUNERS,
    change_adapter,
    config_of,
    merged_as_its_own_model,
    on,
    save_tuned,
)
from changes import change_json
from families import CPU
from neuromerge_hf import MergeError, merge
from tiny_models import load, load_adapted, save_llama


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
        change_adapter(adapter, lambda tensors: next(iter(tensors.values())).fill_(torch.nan))
        assert "NaN" in refused(adapter, bases["llama"], tmp_path)


def test_half_a_computed_adapter_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    for kind, end in (("LOHA", "v_proj.hada_w1_a"), ("VERA", "v_proj.vera_lambda_b")):
        adapter = save_tuned(bases["llama"], tmp_path / kind, config_of(kind, TUNERS[kind]))
        change_adapter(adapter, lambda tensors, end=end: tensors.pop(next(key for key in tensors if key.endswith(end))))
        message = refused(adapter, bases["llama"], tmp_path)
        assert "missing" in message
        assert end in message


def test_a_tensor_that_is_not_known_of_its_type_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_tuned(bases["llama"], tmp_path / "adapter", config_of("LOHA", TUNERS["LOHA"]))
    key = "base_model.model.model.layers.0.self_attn.q_proj.gate"
    change_adapter(adapter, lambda tensors: tensors.update({key: torch.ones(3)}))
    message = refused(adapter, bases["llama"], tmp_path)
    assert "q_proj.gate, which is neither a parameter" in message
    assert "of type LOHA" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 8},
        {"r": 2},
        {"rank_pattern": {"q_proj": 8}},
        {"rank_pattern": {r"layers\.0\.self_attn\.v_proj": 1}},
        {"r": 8, "rank_pattern": {"q_proj": 4}},
    ],
)
@pytest.mark.parametrize("kind", ["LORA", "DoRA"])
def test_an_adapter_whose_configuration_gives_another_rank_is_refused_as_by_peft(
    kind: str, changes: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    config = LoraConfig(r=4, use_dora=kind == "DoRA", **TARGETS)
    adapter = save_tuned(bases["llama"], tmp_path / "adapter", config)
    change_json(adapter / "adapter_config.json", **changes)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_adapted(bases["llama"], adapter)
    message = refused(adapter, bases["llama"], tmp_path)
    if kind == "LORA":
        for words in ("lora_A of model.layers.0.self_attn", "has the rank 4", "(r or rank_pattern)"):
            assert words in message


@pytest.mark.parametrize("name", ["r", "lora_alpha", "alpha_pattern", "rank_pattern"])
def test_options_of_a_wrong_type_or_without_a_finite_value_are_refused(
    name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = save_tuned(bases["llama"], tmp_path / "adapter", LoraConfig(r=4, **TARGETS))
    original = json.loads((adapter / "adapter_config.json").read_text())
    values: dict[str, list[object]] = {
        "r": [0, -4, None, "4", 4.5],
        "lora_alpha": [None, "8", [8], float("nan"), float("inf"), 10**400],
        "alpha_pattern": [{"q_proj": None}, {"(": 3}, [1]],
        "rank_pattern": [{"q_proj": "4"}, {"(": 4}, 3],
    }
    for value in values[name]:
        change_json(adapter / "adapter_config.json", **original | {name: value})
        refused(adapter, bases["llama"], tmp_path)


def test_an_adapter_of_rank_zero_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_tuned(bases["llama"], tmp_path / "adapter", LoraConfig(r=4, **TARGETS))

    def empty(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            tensors[key] = tensor[:0] if "lora_A" in key else tensor[:, :0].contiguous()

    change_adapter(adapter, empty)
    assert "has the rank 0, but its adapter_config.json says 4" in refused(adapter, bases["llama"], tmp_path)
    change_json(adapter / "adapter_config.json", r=0)
    refused(adapter, bases["llama"], tmp_path)


@pytest.mark.parametrize("kind", ["LORA", "LOHA"])
@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": r"model\.layers\.0\.self_attn\.(q|v)_proj"},
        {"exclude_modules": ["v_proj"]},
    ],
    ids=str,
)
def test_tensors_of_modules_that_are_not_targeted_are_left_out_as_by_peft(
    kind: str, changes: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(kind, TUNERS[kind]) if kind != "LORA" else LoraConfig(r=4, **TARGETS)
    adapter = save_tuned(bases["llama"], tmp_path / "adapter", config)
    change_json(adapter / "adapter_config.json", **changes)
    difference, report = merged_as_its_own_model(bases["llama"], adapter, tmp_path / "merged")
    assert difference < 1e-5
    (note,) = report.notes
    assert note.startswith("adapter holds tensors for model.layers.")
    assert "which PEFT does not load by its adapter_config.json (target_modules)" in note


@pytest.mark.parametrize("kind", ["LORA", "LOHA"])
@pytest.mark.parametrize("name", ["q_proj.weight", "q_proj.base_layer.weight", "o_proj.weight"])
def test_weights_beside_those_of_the_tuner_are_taken_if_peft_takes_them(
    kind: str, name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(kind, TUNERS[kind]) if kind != "LORA" else LoraConfig(r=4, **TARGETS)
    adapter = save_tuned(bases["llama"], tmp_path / "adapter", config)
    key = f"base_model.model.model.layers.0.self_attn.{name}"
    weight = load(bases["llama"]).model.layers[0].self_attn.q_proj.weight.detach()
    change_adapter(adapter, lambda tensors: tensors.update({key: weight + 0.5}))
    difference, report = merged_as_its_own_model(bases["llama"], adapter, tmp_path / "merged")
    assert difference < 1e-5
    assert any("q_proj.weight, which PEFT does not load" in note for note in report.notes) == (name == "q_proj.weight")


def test_an_adapter_of_which_no_tensor_is_targeted_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_tuned(bases["llama"], tmp_path / "adapter", LoraConfig(r=4, **TARGETS))
    for targets, words in (
        (["gate_proj"], "names none of these modules"),
        ("(", "target_modules has the regular expression '(', which is not valid"),
    ):
        change_json(adapter / "adapter_config.json", target_modules=targets)
        assert words in refused(adapter, bases["llama"], tmp_path)


def test_without_target_modules_those_that_peft_chooses_are_merged(bases: dict[str, Path], tmp_path: Path) -> None:
    for targets, notes in ((None, 1), ("all-linear", 0)):  # of a Llama, PEFT chooses q_proj and v_proj
        adapter = tmp_path / str(targets)
        save_tuned(bases["llama"], adapter, LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
        change_json(adapter / "adapter_config.json", target_modules=targets)
        difference, report = merged_as_its_own_model(bases["llama"], adapter, tmp_path / f"merged-{targets}")
        assert difference < 1e-5
        assert len(report.notes) == notes


@pytest.mark.parametrize(
    ("name", "other", "words"),
    [
        ("self_attn.q_proj.lora_A.weight", "self_attn.q_proj.base_layer.lora_A.weight", "several of lora_A or lora_B"),
        ("self_attn.q_proj.lora_A.weight", "self_attn.q_proj.lora_embedding_A", "several of lora_A or lora_B"),
        ("input_layernorm.weight", "input_layernorm.modules_to_save.weight", "that differ"),
    ],
)
def test_two_tensors_in_one_place_are_refused(
    name: str, other: str, words: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    config = LoraConfig(r=4, modules_to_save=["input_layernorm"], **TARGETS)
    adapter = save_tuned(bases["llama"], tmp_path / "adapter", config)
    layer = "base_model.model.model.layers.0."
    change_adapter(adapter, lambda tensors: tensors.update({layer + other: tensors[layer + name] + 1}))
    assert words in refused(adapter, bases["llama"], tmp_path)


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
