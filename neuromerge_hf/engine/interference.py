"""What the elections of a merge tell of the experts: sums over neurons of numbers that the kernel has computed anyway.

Each neuron's task vectors have one coordinate along ``w_0`` and one along each singular direction of their orthogonal
parts. The experts *share* a direction in which at least two of them have a coordinate; there they *conflict* where
these do not all have one sign, and a coordinate that lacks the elected sign is *outvoted*: the merge leaves it out.
Directions are weighted by their energy, the sum of the squared coordinates. Merely counted they would say little:
singular vectors are orthogonal, so at most one direction of a neuron that all T experts share can have equal signs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from neuromerge_hf.kernel import Election


@dataclass(frozen=True)
class Sums:
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


def sum_neurons(election: Election) -> Sums:
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
    return Sums(
        gram=gram.sum(0).cpu(),
        energy=_parts(energy.sum(2)),
        outvoted=_parts(outvoted.sum(2)),
        shared=_parts((of_directions * (voters > 1)).sum(1)),
        conflicting=_parts((of_directions * (signs.sum(0).abs() < voters)).sum(1)),
        merged=merged.clamp(min=0).cpu(),
    )


def _parts(directions: Tensor) -> Tensor:
    """Sums of the parallel and of the orthogonal part, (2, ...), from those of the directions, (..., 1 + T)."""
    return torch.stack([directions[..., 0], directions[..., 1:].sum(-1)]).cpu()


def sum_entries(x: Tensor, merged: Tensor) -> Sums:
    """The sums over the entries of a parameter without neurons.

    Args:
        x: (1 + T, n) float32, the base and the trimmed task vectors.
        merged: (n,) float32, the merged parameter.
    """
    exact = x.double()
    change = merged.double() - exact[0]
    parts, part = torch.zeros(2, len(x) - 1, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    return Sums((exact @ exact.T).cpu(), parts, parts, part, part, (change @ change).cpu())
