"""Adding up, over a whole merge, what `interference` finds in its blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from neuromerge_hf.engine.interference import Sums
from neuromerge_hf.engine.thresholds import Trimming
from neuromerge_hf.folder.diagnostics import Diagnostics, ExpertDiagnostics, LayerDiagnostics
from neuromerge_hf.planning.plan import MergePlan, Unit
from neuromerge_hf.skeleton.layers import find_layers

ROUNDING = 1e-12
"""A part with less than this share of the energy is rounding, and has no shares itself."""


class Tally:
    """Sums over the parts of one layer; those of `Sums` at the places of all E experts.

    Attributes:
        base: (E,), the squared norm of the base, over what each expert may change.
        products: (E, E), the inner products of the experts' task vectors.
        norms: (E, E), row s the squared norm of expert s over what it and each other expert may change.
        chance: (), the parallel energy of changes with the same norms that point anywhere.
    """

    def __init__(self, experts: int):
        self.base = torch.zeros(experts, dtype=torch.float64)
        self.products, self.norms = torch.zeros(2, experts, experts, dtype=torch.float64)
        self.energy, self.outvoted = torch.zeros(2, 2, experts, dtype=torch.float64)
        self.shared, self.conflicting = torch.zeros(2, 2, dtype=torch.float64)
        self.chance, self.merged = torch.zeros(2, dtype=torch.float64)

    def add(self, sums: Sums, experts: list[int], width: int) -> None:
        """Add the sums of a block that these experts may change, of neurons with `width` incoming weights."""
        pairs = torch.tensor(experts).unsqueeze(1), torch.tensor(experts)
        products = sums.gram[1:, 1:]
        self.base[experts] += sums.gram[0, 0]
        self.products[pairs] += products
        self.norms[pairs] += products.diagonal().unsqueeze(1)
        self.energy[:, experts] += sums.energy
        self.outvoted[:, experts] += sums.outvoted
        self.chance += sums.energy.sum() / max(1, width)
        self.shared += sums.shared
        self.conflicting += sums.conflicting
        self.merged += sums.merged

    def __iadd__(self, other: "Tally") -> "Tally":
        for name, value in vars(other).items():
            getattr(self, name).add_(value)
        return self


class Record:
    """The tallies of a merge, layer by layer.

    Blocks have one size and are added in the order of the plan, so the sums depend on the inputs alone.
    """

    def __init__(self, plan: MergePlan):
        self._experts = [expert.name for expert in plan.experts]
        self._layers = find_layers(plan.merged)
        self._tallies = {layer: Tally(len(plan.experts)) for layer in self._layers.values()}

    def add(self, unit: Unit, sums: Sums) -> None:
        """Add the sums of a block of a unit."""
        self._tallies[self._layers[unit.parameter]].add(sums, unit.changing, unit.layout.width)

    def diagnostics(self, trimmings: Sequence[Trimming]) -> Diagnostics:
        """What the tallies say, once all blocks are added."""
        model = Tally(len(self._experts))
        for tally in self._tallies.values():
            model += tally
        return Diagnostics(
            experts=[self._expert(t, model, trimming) for t, trimming in enumerate(trimmings)],
            cosines=_cosines(model),
            layers=[_layer(name, tally) for name, tally in self._tallies.items() if tally.energy.any()],
            model=_layer("model", model),
            merged_norm=_rounded(model.merged.sqrt()),
        )

    def _expert(self, t: int, model: Tally, trimming: Trimming) -> ExpertDiagnostics:
        norm2 = model.products[t, t]
        return ExpertDiagnostics(
            name=self._experts[t],
            norm=_rounded(norm2.sqrt()),
            relative_norm=_rounded((norm2 / model.base[t]).sqrt()) if model.base[t] > 0 else None,
            entries_kept=round(1 - trimming.trimmed / trimming.entries, 6) if trimming.entries else 1.0,
            norm_kept=round(1 - trimming.sigma, 6),
            parallel=_shares(model.energy[:, t], model.energy[:, t].sum())[0],
            **_named("outvoted", _shares(model.outvoted[:, t], model.energy[:, t])),
        )


def _layer(name: str, tally: Tally) -> LayerDiagnostics:
    energy = tally.energy.sum(1)
    base = tally.base.sum()
    return LayerDiagnostics(
        name=name,
        relative_norm=_rounded((tally.products.trace() / base).sqrt()) if base > 0 else None,
        parallel=_shares(energy, energy.sum())[0],
        parallel_by_chance=round((tally.chance / energy.sum()).item(), 6) if energy.any() else None,
        **_named("conflicting", _shares(tally.conflicting, tally.shared)),
        **_named("outvoted", _shares(tally.outvoted.sum(1), energy)),
    )


def _cosines(model: Tally) -> list[list[float | None]]:
    lengths = (model.norms * model.norms.T).sqrt()
    cosines = torch.where(lengths > 0, model.products / lengths, torch.nan).clamp(-1, 1)
    return [[None if value != value else round(value, 6) + 0.0 for value in row] for row in cosines.tolist()]


def _shares(parts: Tensor, wholes: Tensor) -> list[float | None]:
    """What two numbers, of the parallel and of the orthogonal part, are of one whole, or each of its own."""
    present = wholes > ROUNDING * wholes.sum()
    shares = torch.where(present, parts / wholes, torch.nan).tolist()
    return [None if share != share else round(share, 6) for share in shares]


def _named(kind: str, shares: list[float | None]) -> dict[str, float | None]:
    return {f"{kind}_parallel": shares[0], f"{kind}_orthogonal": shares[1]}


def _rounded(value: Tensor) -> float:
    return float(f"{value.item():.6g}")
