"""Statistics of a merge's elections: sums over neurons of numbers that the kernel computes anyway.

Each neuron's task vectors have one coordinate along ``w_0`` and one along each singular direction of their orthogonal
parts. Experts *share* a direction if at least two of them have a coordinate in it. They *conflict* in it if these
coordinates have different signs. A coordinate without the elected sign is *outvoted*: the merge leaves it out.
Directions are weighted by their energy, the sum of the squared coordinates. Plain counts would say little: singular
vectors are orthogonal, so all T experts can have equal signs in at most one of the directions that they share.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neuromerge_hf.engine.trimming import Trimming
from neuromerge_hf.folder.diagnostics import Diagnostics, ExpertDiagnostics, LayerDiagnostics
from neuromerge_hf.kernel import Election, gram_matrix, hold_election
from neuromerge_hf.skeleton.layers import find_layers
from neuromerge_hf.sources.unit import Unit, Work


@dataclass(frozen=True)
class BlockStatistics:
    """Sums over some neurons, or over the entries of a parameter without neurons; all float64, on the CPU.

    In attributes with two rows, the first row sums parallel parts, the second orthogonal parts. Parameters without
    neurons have no parts, so both rows are 0.

    Attributes:
        gram: (1 + T, 1 + T), the inner products of the base and the trimmed task vectors.
        energy: (2, T), the squared norms of each task's parts.
        outvoted: (2, T), the energy in coordinates without the elected sign.
        shared: (2,), the energy in directions in which at least two tasks have a coordinate.
        conflicting: (2,), the energy in shared directions in which the signs differ.
        by_chance: (2,), the expectation of `conflicting` if each task vector had a random sign.
        merged: (), the squared norm of the merged task vector.
        kept: (T,), the inner products of the merged task vector with those of the tasks.
    """

    gram: Tensor
    energy: Tensor
    outvoted: Tensor
    shared: Tensor
    conflicting: Tensor
    by_chance: Tensor
    merged: Tensor
    kept: Tensor

    def with_change(self, change: Tensor, kept: Tensor) -> "BlockStatistics":
        """Return the same sums for another merged task vector.

        Args:
            change: (neurons, width) float32, the merged task vector.
            kept: (T,) float64, its inner products with the task vectors.
        """
        return replace(self, merged=change.double().square().sum().cpu(), kept=kept.cpu())

    def times(self, factor: float) -> "BlockStatistics":
        """Return the sums times a number, to estimate those of a tensor that is measured in part."""
        return self if factor == 1 else BlockStatistics(*(factor * value for value in vars(self).values()))


def sum_neurons(election: Election) -> BlockStatistics:
    """Return the sums over the neurons of an election."""
    gram, coefficients = election.gram, election.coefficients
    coordinates, energy = _coordinates(election)
    elected = torch.cat([election.elected_alpha.unsqueeze(0), election.elected.T])
    outvoted = energy * (coordinates * elected <= 0)
    shared, conflicting, by_chance = _conflicts(coordinates, energy)
    products = (gram @ coefficients.unsqueeze(2)).squeeze(2)
    return BlockStatistics(
        gram=gram.sum(0).cpu(),
        energy=_parts(energy.sum(2)),
        outvoted=_parts(outvoted.sum(2)),
        shared=_parts(shared.sum(1)),
        conflicting=_parts(conflicting.sum(1)),
        by_chance=_parts(by_chance.sum(1)),
        merged=(products * coefficients).sum().clamp(min=0).cpu(),
        kept=products[:, 1:].sum(0).cpu(),
    )


def conflicts_of_neurons(election: Election) -> Tensor:
    """Return the orthogonal energy of each neuron that is shared, conflicting, and conflicting by chance.

    Returns:
        (3, neurons) float64.
    """
    return torch.stack([each[1:].sum(0) for each in _conflicts(*_coordinates(election))])


def _coordinates(election: Election) -> tuple[Tensor, Tensor]:
    """Return the tasks' coordinates and their energy: (T, 1 + T, neurons). Neurons come last for speed.

    Direction 0 is w_0, the others are the singular directions.
    """
    coordinates = torch.cat([election.alpha.T.unsqueeze(1), election.u.permute(1, 2, 0)], dim=1)
    squared_lengths = torch.cat([election.gram[:, 0, 0].unsqueeze(0), election.eigenvalues.T.clamp(min=0)])
    return coordinates, coordinates.square().mul_(squared_lengths)


def _conflicts(coordinates: Tensor, energy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the energy that is shared, conflicting, and conflicting by chance: (1 + T, neurons) each."""
    signs = coordinates.sign()
    voters = signs.abs().sum(0)
    by_direction = energy.sum(0)
    shared = by_direction * (voters > 1)
    conflicting = by_direction * (signs.sum(0).abs() < voters)
    return shared, conflicting, shared * (1 - torch.exp2(1 - voters))


def _parts(directions: Tensor) -> Tensor:
    """Sum directions (..., 1 + T) to the parallel and the orthogonal part: (2, ...) on the CPU."""
    return torch.stack([directions[..., 0], directions[..., 1:].sum(-1)]).cpu()


def sum_entries(x: Tensor, merged: Tensor) -> BlockStatistics:
    """Return the sums over the entries of a parameter without neurons.

    Args:
        x: (1 + T, n) float32, the base and the trimmed task vectors.
        merged: (n,) float32, the merged parameter.
    """
    exact = x.double()
    change = merged.double() - exact[0]
    parts, part = torch.zeros(2, len(x) - 1, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    return BlockStatistics(
        gram=(exact @ exact.T).cpu(),
        energy=parts,
        outvoted=parts,
        shared=part,
        conflicting=part,
        by_chance=part,
        merged=(change @ change).cpu(),
        kept=(exact[1:] @ change).cpu(),
    )


def sum_untrimmed(x: Tensor, unit: Unit) -> BlockStatistics:
    """Return the sums over a block of untrimmed task vectors, (1 + T, neurons, width) float32, without a merge."""
    if unit.is_neuronal:
        return sum_neurons(hold_election(gram_matrix(x.transpose(0, 1)), 0.0, 0.0))
    return sum_entries(x[:, 0], x[0, 0])


def inner_products(task_vectors: Iterable[Tensor], change: Tensor) -> Tensor:
    """Return the inner products of task vectors with a merged one, all (neurons, width) float32: (T,) float64."""
    return torch.stack([(task_vector * change).sum(1).double().sum() for task_vector in task_vectors])


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
