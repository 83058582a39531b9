"""Adds up the statistics of blocks, parameter by parameter, to the diagnostics of a merge."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from neuromerge_hf.engine.block_statistics import BlockStatistics
from neuromerge_hf.engine.trimming import Trimming
from neuromerge_hf.folder.diagnostics import Diagnostics, ExpertDiagnostics, LayerDiagnostics
from neuromerge_hf.skeleton.layers import find_layers
from neuromerge_hf.sources.unit import Unit, Work

NEGLIGIBLE = 1e-12
"""A part with less than this share of the energy consists of rounding errors, so shares of it are not reported."""


class InterferenceTotals:
    """The sums of one layer over all E experts; float64 on the CPU.

    `energy`, `outvoted`, `shared`, `conflicting`, `by_chance`, `merged` and `kept` are as in `BlockStatistics`.

    Attributes:
        base: (E,), the squared norm of the base over the parameters that each expert may change.
        products: (E, E), the inner products of the experts' task vectors.
        norms: (E, E). Entry (s, t) is the squared norm of expert s over the parameters that s and t both may change.
        chance: (), the expected parallel energy if all changes had random directions.
    """

    def __init__(self, experts: int):
        self.base = torch.zeros(experts, dtype=torch.float64)
        self.products, self.norms = torch.zeros(2, experts, experts, dtype=torch.float64)
        self.energy, self.outvoted = torch.zeros(2, 2, experts, dtype=torch.float64)
        self.shared, self.conflicting, self.by_chance = torch.zeros(3, 2, dtype=torch.float64)
        self.chance, self.merged = torch.zeros(2, dtype=torch.float64)
        self.kept = torch.zeros(experts, dtype=torch.float64)

    def add(self, sums: BlockStatistics, experts: list[int], width: int) -> None:
        """Add the sums of a block.

        Args:
            sums: the sums over the block's neurons.
            experts: the numbers of the experts that may change the block.
            width: the number of incoming weights of a neuron.
        """
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
        self.by_chance += sums.by_chance
        self.merged += sums.merged
        self.kept[experts] += sums.kept

    def __iadd__(self, other: "InterferenceTotals") -> "InterferenceTotals":
        for name, value in vars(other).items():
            getattr(self, name).add_(value)
        return self


class StatisticsCollector:
    """Collects the statistics of a merge, layer by layer.

    Blocks have a fixed size and are added in the order of the units, so the sums depend on the inputs alone.
    """

    def __init__(self, work: Work):
        self._experts = work.expert_names
        self._layers = find_layers(unit.parameter for unit in work.merged)
        self._totals = {parameter: InterferenceTotals(len(self._experts)) for parameter in self._layers}

    def add(self, unit: Unit, sums: BlockStatistics) -> None:
        """Add the sums of a block of a unit."""
        self._totals[unit.parameter].add(sums, unit.changing, unit.layout.width)

    def diagnostics(self, trimmings: Sequence[Trimming] | None, merges: bool = True) -> Diagnostics:
        """Return the diagnostics of the merge. Call this once all blocks are added.

        Args:
            trimmings: how each expert's task vector was trimmed; None if the sums are those of untrimmed task vectors,
                and nothing was elected.
            merges: whether there is a merged task vector.
        """
        model = InterferenceTotals(len(self._experts))
        layers = {layer: InterferenceTotals(len(self._experts)) for layer in self._layers.values()}
        for parameter, totals in self._totals.items():
            layers[self._layers[parameter]] += totals
        for totals in layers.values():
            model += totals
        elects = trimmings is not None
        experts = [self._expert(t, model, trimmings[t] if trimmings else None) for t in range(len(self._experts))]
        if not merges:
            experts = [replace(expert, survival=None) for expert in experts]
        return Diagnostics(
            experts=experts,
            cosines=_cosines(model),
            layers=[_layer(name, totals, elects, merges) for name, totals in layers.items() if totals.energy.any()],
            model=_layer("model", model, elects, merges),
            merged_norm=_rounded(model.merged.sqrt()) if merges else 0.0,
            parameters=[
                _layer(name, totals, elects, merges, self._layers[name])
                for name, totals in self._totals.items()
                if totals.energy.any()
            ],
        )

    def _expert(self, t: int, model: InterferenceTotals, trimming: Trimming | None) -> ExpertDiagnostics:
        norm2 = model.products[t, t]
        return ExpertDiagnostics(
            name=self._experts[t],
            norm=_rounded(norm2.sqrt()),
            relative_norm=_rounded((norm2 / model.base[t]).sqrt()) if model.base[t] > 0 else None,
            entries_kept=round(1 - trimming.trimmed / trimming.entries, 6) if trimming and trimming.entries else 1.0,
            norm_kept=round(1 - trimming.sigma, 6) if trimming else 1.0,
            parallel=_shares(model.energy[:, t], model.energy[:, t].sum())[0],
            **_named("outvoted", _shares(model.outvoted[:, t], model.energy[:, t]), trimming is not None),
            survival=_survivals(model)[t],
        )


def _layer(name: str, totals: InterferenceTotals, elects: bool, merges: bool, layer: str = "") -> LayerDiagnostics:
    energy = totals.energy.sum(1)
    base = totals.base.sum()
    return LayerDiagnostics(
        name=name,
        relative_norm=_rounded((totals.products.trace() / base).sqrt()) if base > 0 else None,
        parallel=_shares(energy, energy.sum())[0],
        parallel_by_chance=round((totals.chance / energy.sum()).item(), 6) if energy.any() else None,
        **_named("conflicting", _shares(totals.conflicting, totals.shared)),
        **_named("outvoted", _shares(totals.outvoted.sum(1), energy), elects),
        **_named("conflicting_by_chance", _shares(totals.by_chance, totals.shared)),
        relative_norms=_ratios(totals.products.diagonal().sqrt(), totals.base.sqrt()),
        survivals=_survivals(totals) if merges else [],
        cosines=_cosines(totals),
        layer=layer,
    )


def _survivals(totals: InterferenceTotals) -> list[float | None]:
    return _ratios(totals.kept, totals.products.diagonal())


def _ratios(values: Tensor, wholes: Tensor) -> list[float | None]:
    """Return values divided by others; None where the other is 0."""
    ratios = torch.where(wholes > 0, values / wholes, torch.nan).tolist()
    return [None if ratio != ratio else float(f"{ratio:.6g}") for ratio in ratios]


def _cosines(model: InterferenceTotals) -> list[list[float | None]]:
    lengths = (model.norms * model.norms.T).sqrt()
    cosines = torch.where(lengths > 0, model.products / lengths, torch.nan).clamp(-1, 1)
    return [[None if value != value else round(value, 6) + 0.0 for value in row] for row in cosines.tolist()]


def _shares(parts: Tensor, wholes: Tensor) -> list[float | None]:
    """Return the shares of the parallel and the orthogonal part in their wholes; None for a negligible whole."""
    present = wholes > NEGLIGIBLE * wholes.sum()
    shares = torch.where(present, parts / wholes, torch.nan).tolist()
    return [None if share != share else round(share, 6) for share in shares]


def _named(kind: str, shares: list[float | None], known: bool = True) -> dict[str, Any]:
    parallel, orthogonal = shares if known else (None, None)
    return {f"{kind}_parallel": parallel, f"{kind}_orthogonal": orthogonal}


def _rounded(value: Tensor) -> float:
    return float(f"{value.item():.6g}")
