"""Every PEFT adapter that is a change of weights gives its own model back.

What is merged is compared with the unmerged PeftModel: PEFT's own merge_and_unload is wrong where embeddings are tied.
"""

import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file

from adapters import (
    LORA,
    NEEDS,
    TUNERS,
    Variant,
    changed_state,
    config_of,
    merged_as_its_own_model,
    on,
    save_tuned,
    state_of,
)
from families import CPU, GIVES_BACK, Relatives, assert_merged_as_reference, state
from neuromerge_hf import MergeError, NeuroMergingConfig, merge, plan_merge
from neuromerge_hf.sources.peft import effective
from tiny_models import disturb, load, save_fine_tune, seeded


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
    config = NeuroMergingConfig()
    report = merge(experts, tmp_path / "merged", base_model=relatives.base, config=config, **CPU)
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


def test_a_type_that_needs_the_whole_model_maps_no_weight_file(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that maps a file ends by a signal if the file becomes shorter."""
    base = shutil.copytree(bases["llama"], tmp_path / "base")
    adapter = save_tuned(base, tmp_path / "adapter", config_of("VERA", TUNERS["VERA"]))
    before = set(Path("/proc/self/maps").read_text().splitlines())
    load, mapped = effective.PeftModel.from_pretrained, []

    def load_and_look(*arguments, **options):
        model = load(*arguments, **options)
        new = set(Path("/proc/self/maps").read_text().splitlines()) - before
        mapped.append([line for line in new if str(tmp_path) in line])
        return model

    monkeypatch.setattr(effective.PeftModel, "from_pretrained", load_and_look)
    merge([adapter], tmp_path / "merged", base_model=base)
    assert mapped == [[]]
