"""An adapter that makes two matrices of tied embeddings unties them, and any other leaves them tied."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from adapters import (
    STILL_TIED,
    TARGETS_ALONE,
    TIED,
    change_adapter,
    changed_state,
    merged_as_its_own_model,
    save_tuned,
)
from families import CPU, GIVES_BACK, Relatives, assert_merged_as_reference, state
from neuromerge_hf import MergeError, NeuroMergingConfig, merge
from tiny_models import disturb, load, load_adapted, logits, save_fine_tune, seeded


@pytest.mark.parametrize("name", TIED)
def test_an_adapter_that_unties_embeddings_is_given_back_untied(
    name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["tied"]
    adapter = save_tuned(base, tmp_path / "adapter", TIED[name])
    error, _ = merged_as_its_own_model(base, adapter, tmp_path / "merged")
    assert error < 1e-4
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


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
    change_adapter(stored, change_embeddings)
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


def effect_of_lora(adapter: Path, module: str) -> torch.Tensor:
    """The change that a LoRA adapter with PEFT's default alpha makes, from its factors."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
    return 8 / a.shape[0] * b @ a


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
    change_adapter(adapter, change_embeddings)
    error, _ = merged_as_its_own_model(base, adapter, tmp_path / "merged")
    assert error < 1e-4
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True

    change_adapter(adapter, lambda tensors: tensors["base_model.model.lm_head.weight"].add_(1))
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
