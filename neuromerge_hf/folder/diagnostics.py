"""Diagnostics of the experts and of their conflicts. `engine.statistics` defines and measures them."""

from dataclasses import dataclass
from itertools import combinations
from typing import Any


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
    """

    name: str
    norm: float
    relative_norm: float | None
    entries_kept: float
    norm_kept: float
    parallel: float | None
    outvoted_parallel: float | None
    outvoted_orthogonal: float | None


@dataclass(frozen=True)
class LayerDiagnostics:
    """Diagnostics of the neurons of one layer, over all experts. Shares are as in `ExpertDiagnostics`.

    Attributes:
        name: the name of the layer, such as "model.layers.3".
        relative_norm: the norm of all experts' trimmed task vectors divided by the base's, over the parameters that
            each expert may change.
        parallel: the share of the energy that is parallel to the base's neurons; the rest is orthogonal.
        parallel_by_chance: the expected parallel share of random changes: 1/n for n incoming weights.
        conflicting_parallel: the share of the parallel energy where the experts' signs differ, among the neurons where
            several experts have parallel energy.
        conflicting_orthogonal: the same share of the orthogonal energy, among the singular directions.
        outvoted_parallel: the share of the parallel energy that lacks the elected sign; None without an election.
        outvoted_orthogonal: likewise, of the orthogonal energy.
    """

    name: str
    relative_norm: float | None
    parallel: float | None
    parallel_by_chance: float | None
    conflicting_parallel: float | None
    conflicting_orthogonal: float | None
    outvoted_parallel: float | None
    outvoted_orthogonal: float | None


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
    """

    experts: list[ExpertDiagnostics]
    cosines: list[list[float | None]]
    layers: list[LayerDiagnostics]
    model: LayerDiagnostics
    merged_norm: float

    @property
    def elected(self) -> bool:
        """Whether the statistics are those of elections between trimmed task vectors."""
        parts = (self.model.outvoted_parallel, self.model.outvoted_orthogonal)
        return any(part is not None for part in parts)

    @property
    def merged_relative_norm(self) -> float | None:
        """The norm of the merged task vector divided by the mean norm of the experts; None if that is 0."""
        mean = sum(expert.norm for expert in self.experts) / len(self.experts)
        return self.merged_norm / mean if mean else None

    @property
    def sentence(self) -> str:
        """A summary in two sentences."""
        norms = [expert.relative_norm for expert in self.experts if expert.relative_norm]
        if not norms:
            return "The experts change nothing."
        several = len(self.experts) > 1
        trimmed = any(expert.entries_kept < 1 for expert in self.experts)
        first = "After trimming, the norm" if trimmed else "The norm"
        first += f" of {'each' if several else 'the'} expert's change is {_range(norms, '.2%')} "
        first += "of that of the weights it may change"
        pairs = combinations(range(len(self.experts)), 2)
        cosines = [cosine for s, t in pairs if (cosine := self.cosines[s][t]) is not None]
        if cosines:
            first += f", and the cosine between two of them {_range(cosines, '.2f')}"
        if self.model.parallel is not None:
            first += (
                f"; {self.model.parallel:.1%} of the energy is parallel to the base's neurons (by chance it would be "
            )
            first += f"{self.model.parallel_by_chance:.1%}), the rest orthogonal"
        second = f"the merged change is {self.merged_relative_norm:.2f} times as long as the experts' are on average"
        conflicting, outvoted = self.model.conflicting_orthogonal, self.model.outvoted_orthogonal
        if outvoted is not None:
            second = f"the election leaves out {outvoted:.0%} of the orthogonal energy, and {second}"
        if conflicting is not None:
            second = (
                f"of the orthogonal energy that experts share, {conflicting:.0%} lies in directions where their signs "
                f"conflict; {second}"
            )
        return f"{first}. {second[0].upper()}{second[1:]}."


def load_diagnostics(values: dict[str, Any]) -> Diagnostics:
    """Restore `Diagnostics` from the dictionary that `dataclasses.asdict` made of it."""
    return Diagnostics(
        experts=[ExpertDiagnostics(**expert) for expert in values["experts"]],
        cosines=values["cosines"],
        layers=[LayerDiagnostics(**layer) for layer in values["layers"]],
        model=LayerDiagnostics(**values["model"]),
        merged_norm=values["merged_norm"],
    )


def _range(values: list[float], form: str) -> str:
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"
