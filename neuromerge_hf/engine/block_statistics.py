"""Statistics of a merge's elections: sums over neurons of numbers that the kernel computes anyway.

Each neuron's task vectors have one coordinate along ``w_0`` and one along each singular direction of their orthogonal
parts. Experts *share* a direction if at least two of them have a coordinate in it. They *conflict* in it if these
coordinates have different signs. A coordinate without the elected sign is *outvoted*: the merge leaves it out.
Directions are weighted by their energy, the sum of the squared coordinates. Plain counts would say little: singular
vectors are orthogonal, so all T experts can have equal signs in at most one of the directions that they share.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neuromerge_hf.kernel import Election, gram_matrix, hold_election
from neuromerge_hf.sources.unit import Unit


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
