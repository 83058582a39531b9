"""Diagnostics of the experts and of their conflicts. `engine.statistics` defines and measures them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from neuromerge_hf.text import decimal, percent

AT_CHANCE = 0.02
"""Shares of the energy that differ by less from what chance gives are not told apart from it."""


@dataclass(frozen=True)
class ExpertDiagnostics:
    """Diagnostics of one expert's trimmed task vector. Shares are between 0 and 1, or None if they are shares of 0.

    Attributes:
        name: the name of the expert.
        norm: the L2 norm of the task vector.
        relative_norm: this norm divided by the base's, over the parameters that the expert may change.
        entries_kept: the share of the entries that trimming kept.
        norm_kept: the share of the L1 norm that trimming kept: 1 - sigma_t.
        parallel: the share of the neurons' energy (squared L2 norm) that is parallel to the base's neurons; the rest is
            orthogonal.
        outvoted_parallel: the share of the parallel energy that lacks the elected sign; None without an election.
        outvoted_orthogonal: likewise, of the orthogonal energy.
        survival: how much of the task vector the merged one holds: their inner product divided by the squared norm of
            the former. It is 1 if all is kept, 1/T in a mean of T orthogonal task vectors, and negative if the merge
            moves against it.
    """

    name: str
    norm: float
    relative_norm: float | None
    entries_kept: float
    norm_kept: float
    parallel: float | None
    outvoted_parallel: float | None
    outvoted_orthogonal: float | None
    survival: float | None = None


@dataclass(frozen=True)
class LayerDiagnostics:
    """Diagnostics of the neurons of one layer or parameter, over all experts. Shares are as in `ExpertDiagnostics`.

    Attributes:
        name: the name of the layer, such as "model.layers.3", or of the parameter.
        relative_norm: the norm of all experts' trimmed task vectors divided by the base's, over the parameters that
            each expert may change.
        parallel: the share of the energy that is parallel to the base's neurons; the rest is orthogonal.
        parallel_by_chance: the expected parallel share of random changes: 1/n for n incoming weights.
        conflicting_parallel: the share of the parallel energy where the experts' signs differ, among the neurons where
            several experts have parallel energy.
        conflicting_orthogonal: the same share of the orthogonal energy, among the singular directions.
        outvoted_parallel: the share of the parallel energy that lacks the elected sign; None without an election.
        outvoted_orthogonal: likewise, of the orthogonal energy.
        conflicting_by_chance_parallel: what `conflicting_parallel` would be on average if each task vector had a random
            sign: a direction in which m experts have energy conflicts with a probability of 1 - 2^(1 - m).
        conflicting_by_chance_orthogonal: likewise, of the orthogonal energy.
        relative_norms: the relative norm of each expert's trimmed task vector, as in `ExpertDiagnostics`.
        survivals: what survives of each expert's, as in `ExpertDiagnostics`; empty if nothing was merged.
        cosines: the cosine between the trimmed task vectors of every two experts, as in `Diagnostics`.
        layer: the layer of a parameter; "" for a layer.
        effective_ranks: the effective rank of each expert's task vector, a matrix: ``(sum s^2)^2 / sum s^4`` over its
            singular values s, which is r if r of them are equal and the others 0. It is estimated with random
            vectors. Empty unless `inspect_models` measured it.
    """

    name: str
    relative_norm: float | None
    parallel: float | None
    parallel_by_chance: float | None
    conflicting_parallel: float | None
    conflicting_orthogonal: float | None
    outvoted_parallel: float | None
    outvoted_orthogonal: float | None
    conflicting_by_chance_parallel: float | None = None
    conflicting_by_chance_orthogonal: float | None = None
    relative_norms: list[float | None] = field(default_factory=list)
    survivals: list[float | None] = field(default_factory=list)
    cosines: list[list[float | None]] = field(default_factory=list)
    layer: str = ""
    effective_ranks: list[float | None] = field(default_factory=list)

    @property
    def excess(self) -> float | None:
        """How much larger the conflicting share of the orthogonal energy is than by chance."""
        found, chance = self.conflicting_orthogonal, self.conflicting_by_chance_orthogonal
        return None if found is None or chance is None else found - chance


@dataclass(frozen=True)
class NeuronDiagnostics:
    """A neuron in which the experts collide.

    Attributes:
        parameter: the name of its parameter.
        neuron: its number in the parameter, counted over all batches.
        conflicting: the share of the orthogonal energy that experts share where their signs differ.
        by_chance: the same share if each task vector had a random sign.
        energy: its shared orthogonal energy, as a share of the parameter's.
    """

    parameter: str
    neuron: int
    conflicting: float
    by_chance: float
    energy: float


@dataclass(frozen=True)
class Diagnostics:
    """Diagnostics of a merge. The values are rounded to six digits, so that they do not depend on the machine.

    Attributes:
        experts: the diagnostics of each expert, in the merge's order.
        cosines: the cosine between the trimmed task vectors of every two experts, over the parameters that both may
            change; None if one of the vectors is 0.
        layers: the diagnostics of each layer that an expert changes, in the order of the model.
        model: the diagnostics of all layers together.
        merged_norm: the L2 norm of the merged task vector.
        parameters: the diagnostics of each parameter with neurons that an expert changes, in the order of the model.
        neurons: those with the most conflicting energy beyond chance. Empty unless `inspect_models` measured them.
    """

    experts: list[ExpertDiagnostics]
    cosines: list[list[float | None]]
    layers: list[LayerDiagnostics]
    model: LayerDiagnostics
    merged_norm: float
    parameters: list[LayerDiagnostics] = field(default_factory=list)
    neurons: list[NeuronDiagnostics] = field(default_factory=list)

    @property
    def elected(self) -> bool:
        """Whether the statistics are those of elections between trimmed task vectors."""
        parts = (self.model.outvoted_parallel, self.model.outvoted_orthogonal)
        return any(part is not None for part in parts)

    @property
    def colliding(self) -> list[LayerDiagnostics]:
        """The parameters in which signs conflict more than by chance, those that do so most come first."""
        found = [each for each in self.parameters if (each.excess or 0.0) > AT_CHANCE]
        return sorted(found, key=lambda each: -(each.excess or 0.0))

    @property
    def merged_relative_norm(self) -> float | None:
        """The norm of the merged task vector divided by the mean norm of the experts; None if that is 0."""
        mean = sum(expert.norm for expert in self.experts) / len(self.experts)
        return self.merged_norm / mean if mean else None

    @property
    def verdict(self) -> str:
        """One sentence on how much the experts interfere, against what unrelated experts would do by chance."""
        if not any(expert.norm for expert in self.experts):
            return "The experts change nothing."
        if len(self.experts) == 1:
            return "There is one expert, so nothing interferes with it."
        found, chance = self.model.conflicting_orthogonal, self.model.conflicting_by_chance_orthogonal
        if found is None:
            return "No two experts change the same weights, so they do not interfere."
        if chance is None:  # a report of an earlier version
            return f"Signs differ in {percent(found)} of the energy that the experts share."
        shares = f"signs differ in {percent(found)} of the energy that they share, by chance it would be"
        if found > chance + AT_CHANCE:
            return f"The experts pull in opposite directions, so expect interference: {shares} {percent(chance)}."
        if found < chance - AT_CHANCE:
            return f"The experts agree more than unrelated ones would: {shares} {percent(chance)}."
        cosines = self._pair_cosines
        between = f" (cosines {_range(cosines, lambda cosine: decimal(cosine, 2))})" if cosines else ""
        return f"The experts' changes are nearly independent{between}: little interference is expected."

    @property
    def details(self) -> str:
        """Sentences on the size of the experts' changes, and on what the merge keeps of them."""
        norms = [expert.relative_norm for expert in self.experts if expert.relative_norm]
        if not norms:
            return ""
        several = len(self.experts) > 1
        trimmed = any(expert.entries_kept < 1 for expert in self.experts)
        first = "After trimming, the norm" if trimmed else "The norm"
        size = _range(norms, lambda norm: percent(norm, 1))
        first += f" of {'each' if several else 'the'} expert's change is {size} of that of the weights it may change."
        parallel, chance = self.model.parallel, self.model.parallel_by_chance
        if parallel is not None and chance is not None and parallel > chance + AT_CHANCE:
            first += f" {percent(parallel)} of the energy is parallel to the base's neurons, by chance it would be "
            first += f"{percent(chance, 1)}."
        return " ".join(filter(None, [first, self._kept]))

    @property
    def _kept(self) -> str:
        known = [expert for expert in self.experts if expert.survival is not None]
        if not known:
            return ""
        least, most = (choose(known, key=lambda each: each.survival or 0.0) for choose in (min, max))
        if len(known) == 1:
            kept = f"The merged change holds {percent(least.survival or 0.0)} of it"
        else:
            kept = (
                f"The merged change holds between {percent(least.survival or 0.0)} ({least.name}) and "
                f"{percent(most.survival or 0.0)} ({most.name}) of each"
            )
        outvoted = self.model.outvoted_orthogonal
        lost = f"; {percent(outvoted)} of the energy is lost to sign conflicts" if outvoted else ""
        return f"{kept}{lost}."

    @property
    def _pair_cosines(self) -> list[float]:
        pairs = combinations(range(len(self.experts)), 2)
        return [cosine for s, t in pairs if (cosine := self.cosines[s][t]) is not None]


def load_diagnostics(values: dict[str, Any]) -> Diagnostics:
    """Restore `Diagnostics` from the dictionary that `dataclasses.asdict` made of it."""
    return Diagnostics(
        experts=[ExpertDiagnostics(**expert) for expert in values["experts"]],
        cosines=values["cosines"],
        layers=[LayerDiagnostics(**layer) for layer in values["layers"]],
        model=LayerDiagnostics(**values["model"]),
        merged_norm=values["merged_norm"],
        parameters=[LayerDiagnostics(**parameter) for parameter in values.get("parameters", ())],
        neurons=[NeuronDiagnostics(**neuron) for neuron in values.get("neurons", ())],
    )


def _range(values: list[float], shown: Callable[[float], str]) -> str:
    low, high = shown(min(values)), shown(max(values))
    return low if low == high else f"{low} to {high}"
