"""What the elections of a merge tell of the experts: sums over neurons of numbers that the kernel has computed anyway.

Each neuron's task vectors have one coordinate along ``w_0`` and one along each singular direction of their orthogonal
parts. The experts *share* a direction in which at least two of them have a coordinate; there they *conflict* where
these do not all have one sign, and a coordinate that lacks the elected sign is *outvoted*: the merge leaves it out.
Directions are weighted by their energy, the sum of the squared coordinates. Merely counted they would say little:
singular vectors are orthogonal, so at most one direction of a neuron that all T experts share can have equal signs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuromerge_hf.engine.histogram import Trimming
from neuromerge_hf.folder.diagnostics import Diagnostics, ExpertDiagnostics, LayerDiagnostics
from neuromerge_hf.kernel import Election
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.skeleton.layers import find_layers
from neuromerge_hf.sources.unit import Unit


@dataclass(frozen=True)
class BlockStatistics:
    """Sums over some neurons, or over the entries of a parameter without neurons; all float64, on the CPU.

    Where there are two rows, the first is of the parallel parts, the second of the orthogonal ones. Parameters without
    neurons have no parts: there these are 0.

    Attributes:
        gram: (1 + T, 1 + T), the inner products of the base and the trimmed task vectors.
        energy: (2, T), the squared norms of each task's parts.
        outvoted: (2, T), how much of `energy` is in coordinates that lack the elected sign.
        shared: (2,), the energy in directions that at least two tasks have a coordinate in.
        conflicting: (2,), how much of `shared` is in directions where their signs differ.
        merged: (), the squared norm of the merged task vector.
    """

    gram: Tensor
    energy: Tensor
    outvoted: Tensor
    shared: Tensor
    conflicting: Tensor
    merged: Tensor


def sum_neurons(election: Election) -> BlockStatistics:
    """The sums over the neurons of an election."""
    gram, coefficients = election.gram, election.coefficients
    # Direction 0 is that of w_0, the others are the singular ones: (T, 1 + T, neurons), the neurons last for speed.
    coordinates = torch.cat([election.alpha.T.unsqueeze(1), election.u.permute(1, 2, 0)], dim=1)
    elected = torch.cat([election.elected_alpha.unsqueeze(0), election.elected.T])
    squared_unit = torch.cat([gram[:, 0, 0].unsqueeze(0), election.lengths.T.clamp(min=0)])

    energy = coordinates.square().mul_(squared_unit)
    outvoted = energy * (coordinates * elected <= 0)
    signs = coordinates.sign()
    voters = signs.abs().sum(0)
    of_directions = energy.sum(0)
    merged = (gram @ coefficients.unsqueeze(2)).squeeze(2).mul_(coefficients).sum()
    return BlockStatistics(
        gram=gram.sum(0).cpu(),
        energy=_parts(energy.sum(2)),
        outvoted=_parts(outvoted.sum(2)),
        shared=_parts((of_directions * (voters > 1)).sum(1)),
        conflicting=_parts((of_directions * (signs.sum(0).abs() < voters)).sum(1)),
        merged=merged.clamp(min=0).cpu(),
    )


def _parts(directions: Tensor) -> Tensor:
    """The sums of the parallel and of the orthogonal part, (2, ...), from those of the directions, (..., 1 + T)."""
    return torch.stack([directions[..., 0], directions[..., 1:].sum(-1)]).cpu()


def sum_entries(x: Tensor, merged: Tensor) -> BlockStatistics:
    """The sums over the entries of a parameter without neurons.

    Args:
        x: (1 + T, n) float32, the base and the trimmed task vectors.
        merged: (n,) float32, the merged parameter.
    """
    exact = x.double()
    change = merged.double() - exact[0]
    parts, part = torch.zeros(2, len(x) - 1, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    return BlockStatistics((exact @ exact.T).cpu(), parts, parts, part, part, (change @ change).cpu())


ROUNDING = 1e-12
"""A part with less than this share of the energy is rounding, and has no shares itself."""


class InterferenceTotals:
    """Sums over the parts of one layer; those of `BlockStatistics` at the places of all E experts.

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

    def add(self, sums: BlockStatistics, experts: list[int], width: int) -> None:
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

    def __iadd__(self, other: "InterferenceTotals") -> "InterferenceTotals":
        for name, value in vars(other).items():
            getattr(self, name).add_(value)
        return self


class StatisticsCollector:
    """The tallies of a merge, layer by layer.

    Blocks have one size and are added in the order of the plan, so the sums depend on the inputs alone.
    """

    def __init__(self, plan: MergePlan):
        self._experts = [expert.name for expert in plan.experts]
        self._layers = find_layers(plan.merged)
        self._tallies = {layer: InterferenceTotals(len(plan.experts)) for layer in self._layers.values()}

    def add(self, unit: Unit, sums: BlockStatistics) -> None:
        """Add the sums of a block of a unit."""
        self._tallies[self._layers[unit.parameter]].add(sums, unit.changing, unit.layout.width)

    def diagnostics(self, trimmings: Sequence[Trimming]) -> Diagnostics:
        """What the tallies say, once all blocks are added."""
        model = InterferenceTotals(len(self._experts))
        for tally in self._tallies.values():
            model += tally
        return Diagnostics(
            experts=[self._expert(t, model, trimming) for t, trimming in enumerate(trimmings)],
            cosines=_cosines(model),
            layers=[_layer(name, tally) for name, tally in self._tallies.items() if tally.energy.any()],
            model=_layer("model", model),
            merged_norm=_rounded(model.merged.sqrt()),
        )

    def _expert(self, t: int, model: InterferenceTotals, trimming: Trimming) -> ExpertDiagnostics:
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


def _layer(name: str, tally: InterferenceTotals) -> LayerDiagnostics:
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


def _cosines(model: InterferenceTotals) -> list[list[float | None]]:
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
