"""Base and expert need not store their weights in the same way: other names and other forms give the same merge.

Each case stores a model in another way, by hand. Whichever way base and experts are stored in, they merge into the same
model, and it is stored as the base is.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import CPU, GIVES_BACK, assert_same_bits, load, state
from neuromerge_hf import MergeError, NeuroMergingConfig, merge, plan_merge
from stored_forms import CASES, Tensors, as_in_memory


@pytest.fixture
def stored(tmp_path: Path):
    """A copy of a model that is stored in another way, in a file of either kind."""

    def stored(folder: Path, restore: Callable[[Path, Tensors], Tensors], pickled: bool = False) -> Path:
        copy = tmp_path / f"{folder.name}-restored"
        shutil.copytree(folder, copy)
        tensors = load_file(copy / "model.safetensors")
        restored = {name: tensor.contiguous() for name, tensor in restore(folder, tensors).items()}
        assert {name: tensor.shape for name, tensor in restored.items()} != {
            name: tensor.shape for name, tensor in tensors.items()
        }
        (copy / "model.safetensors").unlink()
        if pickled:
            torch.save(restored, copy / "pytorch_model.bin")
        else:
            save_file(restored, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return stored


def stored_names(folder: Path) -> set[str]:
    pickled = folder / "pytorch_model.bin"
    return set(torch.load(pickled) if pickled.exists() else load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("case", CASES)
def test_the_way_in_which_weights_are_stored_changes_nothing(case: str, relatives_of, stored, tmp_path: Path) -> None:
    name, restore = CASES[case]
    relatives = relatives_of(name)
    usual = [relatives.base, relatives.full(0), relatives.full(1)]
    other = [stored(folder, restore, pickled="gamma" in case) for folder in usual]
    states = []
    for base, expert, peer in (
        (usual, usual, usual),
        (usual, other, other),
        (other, other, other),
        (other, usual, other),
    ):
        merged = tmp_path / f"merged-{len(states)}"
        merge([expert[1], peer[2]], merged, base_model=base[0], config=NeuroMergingConfig(), **CPU)
        states.append(state(relatives.load_cleanly(merged)))
        assert stored_names(merged) == stored_names(base[0]) - ({"lm_head.weight"} if "tied" in case else set())
    for key, want in states[0].items():
        assert_same_bits(states[1][key], want, key)
        assert_same_bits(states[2][key], states[3][key], key)
        # Sums over the model are taken in the order of the base's names.
        torch.testing.assert_close(states[2][key], want, rtol=1e-6, atol=1e-7)


def test_a_dtype_of_its_own_survives_the_conversion(relatives_of, stored, tmp_path: Path) -> None:
    relatives = relatives_of("mixtral")

    def halved(folder: Path, tensors: Tensors) -> Tensors:
        return {name: tensor.bfloat16() for name, tensor in as_in_memory(folder, tensors).items()}

    expert = stored(relatives.full(0), halved)
    merge([expert], tmp_path / "merged", base_model=relatives.base, config=GIVES_BACK, **CPU)
    merged = state(relatives.load_cleanly(tmp_path / "merged"))
    for name, tensor in load_file(expert / "model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(merged[name], tensor.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mixtral", ["model.layers.0.mlp.experts.down_proj"]),
        ("gte", [f"layers.1.self_attn.{part}_proj.bias" for part in "qkv"]),
        ("llama", ["model.norm.weight"]),
    ],
)
def test_parameters_in_memory_take_the_form_of_the_base(name: str, parameters: list[str], relatives_of) -> None:
    relatives = relatives_of(name)
    base = plan_merge([relatives.full(0)], base_model=relatives.base).base
    in_memory = load(relatives.family.base_class, relatives.base).state_dict()
    got = base.skeleton.to_stored({key: in_memory[key] for key in parameters}, base.holding(parameters))
    stored = load_file(relatives.base / "model.safetensors")
    assert len(got) == {"mixtral": 3, "gte": 1, "llama": 1}[name]
    for key, tensor in got.items():
        assert_same_bits(tensor, stored[key], key)


# What is refused


def lacking(name: str) -> Callable[[Path, Tensors], Tensors]:
    return lambda folder, tensors: {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize("who", ["base", "expert"])
def test_a_piece_that_is_missing_is_refused(who: str, relatives_of, stored) -> None:
    relatives = relatives_of("mixtral")
    models = {"base": relatives.base, "expert": relatives.full(0)}
    models[who] = stored(models[who], lacking("model.layers.1.block_sparse_moe.experts.2.w3.weight"))
    damaged = re.escape(str(models[who] / "model.safetensors"))
    with pytest.raises(
        MergeError, match=rf"{damaged} .*model\.layers\.1\.mlp\.experts\.gate_up_proj.*some are missing"
    ):
        plan_merge([models["expert"]], base_model=models["base"])


def test_another_shape_under_another_form_is_refused(relatives_of, stored) -> None:
    relatives = relatives_of("mixtral")

    def widened(folder: Path, tensors: Tensors) -> Tensors:
        fused = as_in_memory(folder, tensors)
        return {name: torch.cat([t, t], 2) if name.endswith("gate_up_proj") else t for name, t in fused.items()}

    expert = stored(relatives.full(0), widened)
    with pytest.raises(MergeError, match=r"experts\.gate_up_proj is \(3, 24, 32\), but \(3, 24, 16\) in the base"):
        plan_merge([expert], base_model=relatives.base)


def test_a_conversion_that_transformers_cannot_undo_is_refused_with_the_way_out(relatives_of, stored, tmp_path) -> None:
    # transformers saves a fused convolution of query, key and value in equal parts, whatever their sizes are.
    relatives = relatives_of("olmo-hybrid")
    sizes = [8, 8, 16]

    def in_its_parts(folder: Path, tensors: Tensors) -> Tensors:
        restored = {}
        for name, tensor in as_in_memory(folder, tensors).items():
            if "conv1d" in name:
                parts = zip("qkv", tensor.split(sizes), strict=True)
                restored |= {name.replace("conv1d", f"{part}_conv1d"): values for part, values in parts}
            else:
                restored[name] = tensor
        return restored

    base = stored(relatives.base, in_its_parts)
    with pytest.raises(MergeError, match=r"conv1d.weight of .*full-0.*stored in another form.*save both again"):
        plan_merge([relatives.full(0)], base_model=base)
    merge([relatives.full(0)], tmp_path / "merged", base_model=relatives.base, **CPU)
    relatives.load_cleanly(tmp_path / "merged")
