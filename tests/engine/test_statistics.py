"""What a merge reports of its experts, against sums that are taken slowly: neuron by neuron, by singular value
decomposition, over whole models in float64. What is exact by definition is checked exactly.
"""

import dataclasses
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import reference
from engine_runs import merged_weights
from families import Relatives
from neuromerge_hf import (
    AverageConfig,
    IsoCConfig,
    MergeReport,
    NeuroMergingConfig,
    TaskArithmeticConfig,
    TIESConfig,
    merge,
    plan_merge,
)
from neuromerge_hf.config import MergeConfig
from neuromerge_hf.engine import measured
from neuromerge_hf.folder.diagnostics import Diagnostics, ExpertDiagnostics, LayerDiagnostics, load_diagnostics
from neuromerge_hf.folder.report import load_report
from neuromerge_hf.model_cards.picture import draw
from neuromerge_hf.skeleton.layers import find_layers
from reference import Neurons
from tiny_models import save_adapter, save_fine_tune, save_llama

CPU = {"device": "cpu", "threads": 1}
WEIGHTS = "model.safetensors"
PARTS = ("parallel", "orthogonal")


@dataclass
class Slow:
    """The sums over one layer, or over the model; those of one expert are numbered."""

    energy: dict[tuple[str, int], float] = field(default_factory=lambda: defaultdict(float))
    outvoted: dict[tuple[str, int], float] = field(default_factory=lambda: defaultdict(float))
    shared: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    conflicting: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    by_chance: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, part: str, coordinates: list[float], elected: float) -> None:
        total = math.fsum(x * x for x in coordinates)
        signs = [reference.sign(x) for x in coordinates]
        if len(signs) - signs.count(0) > 1:
            self.shared[part] += total
            self.by_chance[part] += total * conflict_by_chance([sign for sign in signs if sign])
            if 1 in signs and -1 in signs:
                self.conflicting[part] += total
        for expert, x in enumerate(coordinates):
            self.energy[part, expert] += x * x
            if reference.sign(x) != reference.sign(elected):
                self.outvoted[part, expert] += x * x

    def shares(self, experts: list[int]) -> dict[str, float | None]:
        """What is said of some experts together."""
        energy = {part: sum(self.energy[part, expert] for expert in experts) for part in PARTS}
        outvoted = {part: sum(self.outvoted[part, expert] for expert in experts) for part in PARTS}
        return {
            "parallel": share(energy["parallel"], sum(energy.values())),
            **{f"outvoted_{part}": share(outvoted[part], energy[part]) for part in PARTS},
            **{f"conflicting_{part}": share(self.conflicting[part], self.shared[part]) for part in PARTS},
            **{f"conflicting_by_chance_{part}": share(self.by_chance[part], self.shared[part]) for part in PARTS},
        }


def conflict_by_chance(signs: list[int]) -> float:
    """How many of all ways to turn the experts' changes around make their signs differ."""
    ways = list(itertools.product((1, -1), repeat=len(signs)))
    return sum(len({a * b for a, b in zip(way, signs, strict=True)}) > 1 for way in ways) / len(ways)


def share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def vote(w0: Tensor, taus: Tensor) -> Iterator[tuple[str, list[float], float]]:
    """The coordinates of each direction of a neuron, and their elected mean."""
    w0, taus = w0.double(), taus.double()
    length = float(w0.norm())
    along = [float(tau @ w0) / length if length else 0.0 for tau in taus]
    yield "parallel", along, reference.elect_mean(along)

    orthogonal = torch.stack([tau - x * w0 / (length or 1) for tau, x in zip(taus, along, strict=True)])
    orthogonal[[bool(o @ o <= 1e-12 * (tau @ tau)) for o, tau in zip(orthogonal, taus, strict=True)]] = 0
    u, s, _ = torch.linalg.svd(orthogonal, full_matrices=False)
    s = torch.where(s > 1e-10 * s[0], s, 0.0)
    columns = torch.where(u.abs() < 1e-10, 0.0, u * s).T.tolist()
    elected = reference.elect_means(columns, (1e-10 * s).tolist())
    yield from (("orthogonal", column, mean) for column, mean in zip(columns, elected, strict=True))


def assert_as_summed_slowly(
    report: MergeReport,
    base: dict[str, Tensor],
    experts: list[dict[str, Tensor]],
    neurons: dict[str, Neurons | None],
    merged: dict[str, Tensor],
    *,
    exact_task_vectors: bool,
) -> None:
    """As `families.assert_merged_as_reference`: a LoRA's task vector is rounded when it is added to the base."""
    diagnostics = report.diagnostics
    assert diagnostics is not None
    rel = 6e-6 if exact_task_vectors else 1e-4
    count = len(experts)
    trimmed = []
    for expert, of_report in zip(experts, report.experts, strict=True):
        tau = {name: theta.float() - base[name].float() for name, theta in expert.items()}
        threshold = of_report.threshold * (1 if exact_task_vectors else 1 - 1e-5)
        kept = {name: t.abs() >= threshold for name, t in tau.items()}
        trimmed.append({name: torch.where(kept[name], t, 0.0).double() for name, t in tau.items()})
        entries = sum(t.numel() for t in tau.values())
        found = diagnostics.experts[len(trimmed) - 1]
        assert found.entries_kept == pytest.approx(sum(int(k.sum()) for k in kept.values()) / entries, abs=1e-6)
        assert found.norm_kept == pytest.approx(1 - of_report.sigma, abs=1e-6)

    layers = find_layers(base)
    slow: dict[str, Slow] = defaultdict(Slow)
    for name, theta in base.items():
        view = neurons.get(name)
        taus = [task.get(name, torch.zeros(theta.shape)) for task in trimmed]
        if view is None or not any(tau.any() for tau in taus):
            continue
        for w0, *of_neuron in zip(view.to_rows(theta), *map(view.to_rows, taus), strict=True):
            for direction in vote(w0, torch.stack(of_neuron)):
                slow[layers[name]].add(*direction)
                slow["model"].add(*direction)

    def norm2(values: list[Tensor]) -> float:
        return math.fsum(float(value.double().square().sum()) for value in values)

    def agrees(got: float | None, want: float | None) -> bool:
        return got == (None if want is None else pytest.approx(want, rel=rel, abs=rel))

    def chance(layer: str) -> float:
        rows = [
            view.to_rows(tau)
            for task in trimmed
            for name, tau in task.items()
            if (view := neurons.get(name)) and layer in ("model", layers[name])
        ]
        return sum(norm2([each]) / each.shape[1] for each in rows) / norm2(rows)

    for t, found in enumerate(diagnostics.experts):
        norm = math.sqrt(norm2(list(trimmed[t].values())))
        assert found.name == report.experts[t].name
        assert found.norm == pytest.approx(norm, rel=rel)
        assert found.relative_norm == pytest.approx(norm / math.sqrt(norm2([base[n] for n in trimmed[t]])), rel=rel)
        for name, want in slow["model"].shares([t]).items():
            assert name.startswith("conflicting") or agrees(getattr(found, name), want), name

    for s, t in itertools.product(range(count), repeat=2):
        both = trimmed[s].keys() & trimmed[t].keys()
        product = math.fsum(float((trimmed[s][name] * trimmed[t][name]).sum()) for name in both)
        lengths = [math.sqrt(norm2([trimmed[e][name] for name in both])) for e in (s, t)]
        assert agrees(diagnostics.cosines[s][t], share(product, math.prod(lengths)))

    change = {name: merged[name].double() - theta.double() for name, theta in base.items()}
    order = list(dict.fromkeys(layers.values()))
    assert [layer.name for layer in diagnostics.layers] == [layer for layer in order if layer in slow]
    for layer in [*diagnostics.layers, diagnostics.model]:
        for name, want in slow[layer.name].shares(list(range(count))).items():
            assert agrees(getattr(layer, name), want), (layer.name, name)
        assert layer.parallel_by_chance == pytest.approx(chance(layer.name), abs=1e-6)
        of_layer = [(e, n) for e, task in enumerate(trimmed) for n in task if layer.name in ("model", layers[n])]
        ratio = norm2([trimmed[e][n] for e, n in of_layer]) / norm2([base[n] for _, n in of_layer])
        assert layer.relative_norm == pytest.approx(math.sqrt(ratio), rel=rel)
        for e in range(count):
            names = [name for expert, name in of_layer if expert == e]
            norm, base_norm = norm2([trimmed[e][n] for n in names]), norm2([base[n] for n in names])
            assert agrees(layer.relative_norms[e], math.sqrt(norm / base_norm) if base_norm else None)
            product = sum(float((change[n] * trimmed[e][n]).sum()) for n in names)
            assert layer.survivals[e] == (pytest.approx(product / norm, rel=1e-4, abs=1e-4) if norm else None)
    assert diagnostics.merged_norm == pytest.approx(math.sqrt(norm2(list(change.values()))), rel=max(rel, 1e-5))
    assert [expert.survival for expert in diagnostics.experts] == diagnostics.model.survivals


CASES = {
    "full fine-tunes": ("llama", "fff", NeuroMergingConfig(density=0.2)),
    "both parts": ("llama", "ff", NeuroMergingConfig(density=0.5, lambda_parallel=0.5)),
    "adapters from their factors": ("llama", "lll", NeuroMergingConfig(density=1, lambda_parallel=0.5)),
    "Conv1D, both kinds": ("gpt2", "fl", NeuroMergingConfig(density=0.3)),
    "fused experts": ("gpt-oss", "lf", NeuroMergingConfig(density=1)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_number_is_the_one_that_is_summed_slowly(case: str, tmp_path: Path) -> None:
    family, kinds, config = CASES[case]
    relatives = Relatives(family, tmp_path)
    experts = [{"f": relatives.full, "l": relatives.adapter}[kind](n) for n, kind in enumerate(kinds)]
    report = merge(experts, tmp_path / "merged", base_model=relatives.base, config=config, **CPU)
    base = relatives.base_state()
    assert_as_summed_slowly(
        report,
        base,
        relatives.experts_state(experts),
        relatives.family.neurons_of(base),
        relatives.base_state(tmp_path / "merged"),
        exact_task_vectors="l" not in kinds,
    )


# What is exact


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def experts(base: Path) -> list[Path]:
    fine_tunes = [save_fine_tune(base, base.parent / f"full-{seed}", seed=seed) for seed in (1, 2)]
    return [*fine_tunes, save_adapter(base, base.parent / "lora", seed=3)]


def changed(base: Path, folder: Path, change) -> Path:
    """The base with each of its weights replaced by `change(name, weight)`."""
    weights = {name: change(name, weight) for name, weight in load_file(base / WEIGHTS).items()}
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def diagnose(base: Path, experts: list[Path], output: Path, threads: int = 1, **config) -> Diagnostics:
    settings = NeuroMergingConfig(**({"density": 1} | config))
    report = merge(experts, output, base_model=base, config=settings, device="cpu", threads=threads)
    assert report.diagnostics is not None
    return report.diagnostics


def test_identical_experts_have_cosine_one_and_no_conflicts(base: Path, experts: list[Path], tmp_path: Path) -> None:
    twins = [base.parent / name for name in ("full-1", "twin")]
    if not twins[1].exists():
        twins[1].symlink_to(twins[0])
    found = diagnose(base, twins, tmp_path / "merged", lambda_parallel=1, lambda_orthogonal=1)
    assert found.cosines == [[1, 1], [1, 1]]
    for layer in [found.model, *found.layers]:
        assert layer.conflicting_parallel == layer.conflicting_orthogonal == 0
        assert layer.outvoted_parallel == layer.outvoted_orthogonal == 0
        assert layer.survivals == pytest.approx([1, 1], rel=1e-5)
    assert found.merged_relative_norm == pytest.approx(1, rel=1e-5)


def test_opposite_experts_conflict_everywhere(base: Path, tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(0)
    # Whole multiples of a power of two: what is added to the base is what is subtracted from it.
    steps = {
        name: torch.randint(-8, 9, weight.shape, generator=noise) / 64
        for name, weight in load_file(base / WEIGHTS).items()
    }
    origin = changed(base, tmp_path / "origin", lambda name, weight: (weight * 1024).round() / 1024)
    there = changed(origin, tmp_path / "there", lambda name, weight: weight + steps[name])
    back = changed(origin, tmp_path / "back", lambda name, weight: weight - steps[name])
    found = diagnose(origin, [there, back], tmp_path / "merged")
    assert found.cosines == [[1, -1], [-1, 1]]
    for layer in [found.model, *found.layers]:
        assert layer.conflicting_parallel == layer.conflicting_orthogonal == 1
        assert layer.outvoted_parallel == layer.outvoted_orthogonal == 1
        assert layer.survivals == [0, 0]
    assert found.merged_norm == 0
    assert found.verdict == (
        "The experts pull in opposite directions, so expect interference: signs differ in 100% of the energy that they "
        "share, by chance it would be 50%."
    )


def test_a_purely_parallel_change_has_all_its_energy_parallel(base: Path, tmp_path: Path) -> None:
    larger = changed(base, tmp_path / "larger", lambda _, weight: 1.5 * weight)
    found = diagnose(base, [larger], tmp_path / "merged")
    for each in [found.model, *found.layers, *found.experts]:
        assert each.parallel == 1
        assert each.relative_norm == 0.5
        assert each.outvoted_orthogonal is None


def test_a_purely_orthogonal_change_has_none_parallel(base: Path, tmp_path: Path) -> None:
    def turned(_: str, weight: Tensor) -> Tensor:
        pairs = weight.unflatten(-1, (-1, 2)).flip(-1) * torch.tensor([1.0, -1.0])
        return weight + pairs.flatten(-2) if weight.ndim > 1 else weight

    found = diagnose(base, [changed(base, tmp_path / "turned", turned)], tmp_path / "merged")
    assert found.model.parallel == 0
    assert found.model.outvoted_orthogonal == 0
    assert found.model.outvoted_parallel is None  # there is nothing to speak of


def test_experts_that_change_different_parameters_have_no_cosine(base: Path, tmp_path: Path) -> None:
    adapters = [
        save_adapter(base, tmp_path / module, seed=1, target_modules=[module]) for module in ("q_proj", "up_proj")
    ]
    found = diagnose(base, adapters, tmp_path / "merged")
    assert found.cosines == [[1, None], [None, 1]]
    assert found.model.conflicting_orthogonal is None
    assert found.model.outvoted_orthogonal == 0
    assert [layer.name for layer in found.layers] == ["model.layers.0", "model.layers.1"]


def test_an_expert_that_changes_nothing_is_said_to(base: Path, experts: list[Path], tmp_path: Path) -> None:
    copy = changed(base, tmp_path / "copy", lambda _, weight: weight)
    found = diagnose(base, [copy, experts[0]], tmp_path / "merged")
    nothing = found.experts[0]
    assert (nothing.norm, nothing.relative_norm, nothing.parallel, nothing.norm_kept) == (0, 0, None, 1)
    assert found.cosines == [[None, None], [None, 1]]
    same = diagnose(base, [copy], tmp_path / "same")
    assert (same.verdict, same.details) == ("The experts change nothing.", "")


def test_trimming_tells_what_it_kept(base: Path, experts: list[Path], tmp_path: Path) -> None:
    found = diagnose(base, experts, tmp_path / "merged", density=0.25)
    for expert in found.experts:
        assert expert.entries_kept == pytest.approx(0.25, abs=1e-4)
        assert 0.4 < expert.norm_kept < 0.6


# What it does not depend on


@pytest.mark.parametrize("density", [0.3, 1])
def test_the_order_of_the_experts_does_not_matter(
    density: float, base: Path, experts: list[Path], tmp_path: Path
) -> None:
    want = diagnose(base, experts, tmp_path / "want", density=density)
    got = diagnose(base, experts[::-1], tmp_path / "got", density=density)
    for layer, other in zip([got.model, *got.layers], [want.model, *want.layers], strict=True):
        turned: dict[str, Any] = {name: getattr(other, name)[::-1] for name in ("relative_norms", "survivals")}
        turned["cosines"] = [row[::-1] for row in other.cosines[::-1]]
        assert layer == dataclasses.replace(other, **turned)
    assert got.experts == want.experts[::-1]
    assert got.cosines == [row[::-1] for row in want.cosines[::-1]]
    assert got.merged_norm == want.merged_norm


@pytest.mark.parametrize("kinds", ["full", "LoRA"])
def test_neither_threads_nor_blocks_matter(kinds: str, base: Path, experts: list[Path], tmp_path: Path) -> None:
    merged = {"full": experts, "LoRA": [experts[2], save_adapter(base, tmp_path / "other", seed=4, r=3)]}[kinds]
    want = diagnose(base, merged, tmp_path / "want")
    assert diagnose(base, merged, tmp_path / "three threads", threads=3) == want
    plan = plan_merge(merged, base_model=base, config=NeuroMergingConfig(density=1))
    for threads in (1, 3):
        got = merged_weights(plan, tmp_path / f"threads-{threads}", threads=threads, block_entries=150)
        assert got.diagnostics == want


def test_the_report_keeps_it_in_a_file(base: Path, experts: list[Path], tmp_path: Path) -> None:
    found = diagnose(base, experts, tmp_path / "merged")
    assert load_report(tmp_path / "merged").diagnostics == found
    assert load_diagnostics(json.loads(json.dumps(dataclasses.asdict(found), allow_nan=False))) == found


# Layers


def test_layers_are_named_after_the_blocks_of_the_model() -> None:
    names = [
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.10.mlp.experts.3.up_proj.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "model.embed_tokens.weight",
    ]
    found = find_layers(names)
    assert list(dict.fromkeys(found.values())) == [
        "model.embed_tokens",
        "model.layers.2",
        "model.layers.10",
        "lm_head",
        "model.norm",
    ]
    assert found[names[2]] == "model.layers.10"


def test_each_list_of_blocks_has_its_own_layers(tmp_path: Path) -> None:
    relatives = Relatives("t5", tmp_path)
    found = diagnose(relatives.base, [relatives.full(0)], tmp_path / "merged")
    assert [layer.name for layer in found.layers] == [
        "shared",
        *(f"{stack}.block.{block}" for stack in ("encoder", "decoder") for block in range(2)),
    ]


# In words and as a picture


def told(conflicting: float | None, by_chance: float | None, names: tuple[str, ...] = ("math", "code")) -> Diagnostics:
    """Diagnostics in which some energy conflicts, and some would by chance."""
    found = made_up(list(names), 2)
    conflicts = {"conflicting_orthogonal": conflicting, "conflicting_by_chance_orthogonal": by_chance}
    model = dataclasses.replace(found.model, parallel=0.029, outvoted_orthogonal=0.08, **conflicts)
    cosines = [[1.0 if s == t else -0.001 for t in range(len(names))] for s in range(len(names))]
    return dataclasses.replace(found, cosines=cosines, model=model)


def test_what_is_at_chance_is_called_no_conflict() -> None:
    at_chance = told(0.51, 0.5).verdict
    assert at_chance == "The experts' changes are nearly independent (cosines 0.00): little interference is expected."
    assert "agree more than unrelated ones" in told(0.47, 0.5).verdict
    assert "pull in opposite directions" in told(0.53, 0.5).verdict
    assert "signs differ in 53% of the energy that they share, by chance it would be 50%" in told(0.53, 0.5).verdict
    assert told(None, None).verdict == "No two experts change the same weights, so they do not interfere."
    assert told(0.53, None).verdict == "Signs differ in 53% of the energy that the experts share."  # an older report
    assert told(0.5, 0.5, ("math",)).verdict == "There is one expert, so nothing interferes with it."


def test_random_experts_conflict_by_chance(base: Path, tmp_path: Path) -> None:
    """The changes of three experts, of very different lengths, are independent."""
    noise = torch.Generator().manual_seed(0)

    def moved(length: float, number: int) -> Path:
        def move(_: str, weight: Tensor) -> Tensor:
            return weight + length * torch.randn(weight.shape, generator=noise)

        return changed(base, tmp_path / f"expert-{number}", move)

    found = diagnose(base, [moved(length, n) for n, length in enumerate((0.001, 0.01, 0.02))], tmp_path / "merged")
    assert found.model.conflicting_by_chance_orthogonal == 0.75
    assert found.model.conflicting_orthogonal == pytest.approx(0.75, abs=0.02)
    assert "nearly independent" in found.verdict


def test_the_details_name_who_is_kept_least_and_most() -> None:
    found = told(0.5, 0.5)
    experts = [
        dataclasses.replace(expert, survival=kept) for expert, kept in zip(found.experts, (0.41, 0.9), strict=True)
    ]
    found = dataclasses.replace(found, experts=experts)
    assert found.details == (
        "After trimming, the norm of each expert's change is 1.0% to 1.5% of that of the weights it may change. "
        "The merged change holds between 41% (math) and 90% (code) of each; 8% of the energy is lost to sign conflicts."
    )
    parallel = dataclasses.replace(found, model=dataclasses.replace(found.model, parallel=0.3))
    assert "30% of the energy is parallel to the base's neurons, by chance it would be 2.6%." in parallel.details


@pytest.mark.parametrize("config", [AverageConfig(), TaskArithmeticConfig(scale=0.3), TIESConfig(), IsoCConfig()])
def test_every_method_tells_what_it_keeps(config: MergeConfig, base: Path, experts: list[Path], tmp_path: Path) -> None:
    models = [experts[0], experts[1]]
    report = merge(models, tmp_path / "merged", base_model=base, config=config, dtype="float32", **CPU)
    before, after = load_file(base / WEIGHTS), load_file(tmp_path / "merged" / WEIGHTS)
    assert report.diagnostics is not None
    for model, found in zip(models, report.diagnostics.experts, strict=True):
        weights = load_file(model / WEIGHTS)
        task_vector = torch.cat([(weights[name] - before[name]).double().flatten() for name in before])
        change = torch.cat([(after[name] - before[name]).double().flatten() for name in before])
        assert found.norm == pytest.approx(float(task_vector.norm()), rel=1e-5)
        assert found.survival == pytest.approx(float(change @ task_vector / task_vector.square().sum()), rel=1e-4)
        assert found.outvoted_orthogonal is None


def test_large_tensors_are_measured_in_part_by_methods_without_elections(
    base: Path, experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_merge(experts[:2], base_model=base, config=TIESConfig(density=0.5))
    whole = merged_weights(plan, tmp_path / "whole").diagnostics
    monkeypatch.setattr(measured, "LARGE", 500)
    monkeypatch.setattr(measured, "RUN", 2)
    monkeypatch.setattr(measured, "PERIOD", 4)
    part = merged_weights(plan, tmp_path / "part").diagnostics
    assert part != whole
    for of_part, of_whole in zip(part.experts, whole.experts, strict=True):
        assert of_part.norm == pytest.approx(of_whole.norm, rel=0.1)
        assert of_part.survival == pytest.approx(of_whole.survival, rel=0.1)
    for threads in (1, 3):
        again = merged_weights(plan, tmp_path / f"{threads}", threads=threads, block_entries=150)
        assert again.diagnostics == part


def made_up(names: list[str], blocks: int) -> Diagnostics:
    """Diagnostics of made-up numbers."""

    def layer(name: str, number: int) -> LayerDiagnostics:
        shares = [(number * step % 10) / 10 for step in (3, 7, 9, 1)]
        norms = [(number + expert) % 5 / 100 for expert in range(len(names))]
        return LayerDiagnostics(name, 0.01, number % 7 / 100, 0.026, *shares, relative_norms=list(norms))

    layers = ["model.embed_tokens", *(f"model.layers.{block}" for block in range(blocks)), "lm_head"]
    return Diagnostics(
        experts=[
            ExpertDiagnostics(name, 2.0, 0.01 + number % 2 / 200, 0.2, 0.44, 0.03, 0.1, 0.1)
            for number, name in enumerate(names)
        ],
        cosines=[[1.0 if s == t else (-1) ** (s + t) * 0.17 for t in range(len(names))] for s in range(len(names))],
        layers=[layer(name, number) for number, name in enumerate(layers)],
        model=layer("model", 1),
        merged_norm=1.0,
    )


@pytest.mark.parametrize(("experts", "blocks"), [(1, 0), (2, 2), (10, 48), (3, 200)])
def test_the_picture_is_small_and_always_the_same(experts: int, blocks: int, tmp_path: Path) -> None:
    found = made_up([f"expert-{number}" for number in range(experts)], blocks)
    for name in ("one.png", "two.png"):
        draw(found, [], tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert (tmp_path / "one.png").stat().st_size < 200_000
    with Image.open(tmp_path / "one.png") as image:
        assert image.width == 1280
        assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)  # opaque, in dark mode as well
        assert not image.info.keys() & {"Software", "Creation Time"}


@pytest.mark.parametrize(
    "name", ["$\\frac{1}{$", "a" * 500, "模型\n\u202ename", "<b>|`*_", "\x00\x1b[31m", "👩‍👩‍👧", "", " "]
)
def test_the_picture_takes_any_name(name: str, tmp_path: Path) -> None:
    found = made_up([name, "other"], 2)
    strange = [dataclasses.replace(layer, name=layer.name.replace("model", name)) for layer in found.layers]
    draw(dataclasses.replace(found, layers=strange), [], tmp_path / "picture.png")  # warnings are errors here
    draw(made_up(["plain", "other"], 2), [], tmp_path / "plain.png")
    assert (tmp_path / "picture.png").read_bytes() != (tmp_path / "plain.png").read_bytes()


def test_the_picture_shows_what_is_missing_as_missing(base: Path, experts: list[Path], tmp_path: Path) -> None:
    copy = changed(base, tmp_path / "copy", lambda _, weight: weight)
    for name, models in {"one": experts[:1], "with a copy": [copy, experts[0]], "nothing": [copy]}.items():
        draw(diagnose(base, models, tmp_path / name), [], tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_drawing_leaves_no_setting_behind(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw(made_up(["a", "b"], 2), [], tmp_path / "picture.png")
    assert dict(matplotlib.rcParams) == before
