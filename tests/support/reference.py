"""A slow and direct implementation of NeuroMerging, against which the fast one is tested.

It uses float64, explicit projections, the singular value decomposition itself, and Python loops over neurons and
directions. It shares neither code nor shortcuts with the package. Symbols are those of the paper (arXiv:2503.05320).
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

# Rounding turns an exact 0 into a tiny number. Its sign means nothing, so it must not be counted in a mean.
ZERO_PART = 1e-12  # an orthogonal part is zero below this share of ||tau||^2
ZERO_COORDINATE = 1e-10  # S_j is zero below this share of the largest S, and coordinates and their sums, of S_j


@dataclass(frozen=True)
class Neurons:
    """The axes of a weight that number its neurons. The other axes, flattened, are a neuron's incoming weights."""

    axes: tuple[int, ...]

    def to_rows(self, weight: Tensor) -> Tensor:
        first = weight.movedim(self.axes, tuple(range(len(self.axes))))
        return first.reshape(math.prod(weight.shape[axis] for axis in self.axes), -1)

    def from_rows(self, rows: Tensor, shape: torch.Size) -> Tensor:
        others = [axis for axis in range(len(shape)) if axis not in self.axes]
        first = rows.reshape([shape[axis] for axis in (*self.axes, *others)])
        return first.movedim(tuple(range(len(self.axes))), self.axes)


LINEAR = EMBEDDING = CONV = Neurons((0,))
CONV1D = CONV_TRANSPOSE = Neurons((1,))
FUSED_EXPERTS = Neurons((0, 1))  # (E, out, in)
FUSED_EXPERTS_TRANSPOSED = Neurons((0, 2))  # (E, in, out)


def sign(value: float) -> int:
    return (value > 0) - (value < 0)


def threshold(entries: list[Tensor], density: float) -> float:
    """The j-th smallest magnitude among all entries, j = floor((1 - density) * n); 0.0 if j is 0."""
    magnitudes = torch.cat([entry.flatten().abs() for entry in entries]).sort().values
    j = math.floor((1 - Fraction(str(density))) * len(magnitudes))
    return float(magnitudes[j - 1]) if j else 0.0


def elected_sign(values: list[float], rounding: float = 0.0) -> int:
    total = math.fsum(values)
    return sign(total) if abs(total) > rounding else 0


def elect_mean(values: list[float], tie_sign: int = 0, rounding: float = 0.0) -> float:
    """The mean of the values that have the elected sign: the sign of the sum, or `tie_sign` if the sum is 0."""
    elected = elected_sign(values, rounding) or tie_sign
    chosen = [value for value in values if elected and sign(value) == elected]
    return math.fsum(chosen) / len(chosen) if chosen else 0.0


def elect_means(columns: list[list[float]], roundings: list[float]) -> list[float]:
    """`elect_mean` of each column; a column that ties takes the majority sign of the other columns."""
    signs = [elected_sign(*column) for column in zip(columns, roundings, strict=True)]
    others = [sign(sum(signs) - own) for own in signs]
    return [elect_mean(*column) for column in zip(columns, others, roundings, strict=True)]


def merge_parts(w0: Tensor, taus: Tensor) -> tuple[Tensor, Tensor]:
    """psi_par and psi_orth (n,) of one neuron, for `w0` (n,) and trimmed task vectors `taus` (T, n)."""
    w0, taus = w0.double(), taus.double()
    alphas = [float(tau @ w0 / (w0 @ w0)) if w0.any() else 0.0 for tau in taus]

    orthogonal = torch.stack([tau - alpha * w0 for tau, alpha in zip(taus, alphas, strict=True)])
    for tau, part in zip(taus, orthogonal, strict=True):
        if part @ part <= ZERO_PART * (tau @ tau):
            part.zero_()

    u, s, vh = torch.linalg.svd(orthogonal, full_matrices=False)
    lengths = [length if length > ZERO_COORDINATE * float(s[0]) else 0.0 for length in s.tolist()]
    roundings = [ZERO_COORDINATE * length for length in lengths]
    columns = []
    for direction, length, rounding in zip(u.T.tolist(), lengths, roundings, strict=True):
        coordinates = [length * value for value in direction]
        columns.append([x if abs(x) > rounding else 0.0 for x in coordinates])

    psi_orth = torch.zeros_like(w0)
    for x, v in zip(elect_means(columns, roundings), vh, strict=True):
        psi_orth += x * v
    return elect_mean(alphas) * w0, psi_orth


def merge_neuron(w0: Tensor, taus: Tensor, lambda_1: float, lambda_2: float) -> Tensor:
    """The merged neuron, for base weights `w0` (n,) and trimmed task vectors `taus` (T, n)."""
    if not taus.any():
        return w0.double()
    psi_par, psi_orth = merge_parts(w0, taus)
    return w0.double() + lambda_1 * psi_par + lambda_2 * psi_orth


def merge_vector(w0: Tensor, taus: Tensor, lambda_2: float) -> Tensor:
    """A merged parameter that has no neurons, flattened: `w0` (n,), trimmed task vectors `taus` (T, n)."""
    if not taus.any():
        return w0.double()
    elected = elect_means(taus.double().T.tolist(), [0.0] * len(w0))
    return w0.double() + lambda_2 * torch.tensor(elected, dtype=torch.float64)


def merge_model(
    base: dict[str, Tensor],
    experts: list[dict[str, Tensor]],
    neurons: dict[str, Neurons | None],
    density: float,
    lambda_1: float,
    lambda_2: float | Literal["auto"] = "auto",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Merge whole state dicts. Return the merged one, with sigma, the thresholds and lambda_2.

    Parameters that an expert changes become float64; all others are the base's own tensors. An expert holds only the
    parameters that it may change. `neurons` has the neurons of each parameter; those of None and of missing names have
    none.
    """
    floating = {name for name, tensor in base.items() if tensor.is_floating_point()}
    tasks = [
        {name: theta.float() - base[name].float() for name, theta in expert.items() if name in floating}
        for expert in experts
    ]

    thresholds, sigma_t = [], []
    for task in tasks:
        cut = threshold(list(task.values()), density) if task else 0.0
        total = math.fsum(float(tau.double().abs().sum()) for tau in task.values())
        removed = math.fsum(float(tau[tau.abs() < cut].double().abs().sum()) for tau in task.values())
        thresholds.append(cut)
        sigma_t.append(removed / total if total else 0.0)
    sigma = max(sigma_t)
    scale = 1 / (1 - sigma) if lambda_2 == "auto" else lambda_2

    merged = {}
    for name, theta in base.items():
        trimmed = []
        for task, cut in zip(tasks, thresholds, strict=True):
            tau = task.get(name, torch.zeros(theta.shape))
            trimmed.append(torch.where(tau.abs() >= cut, tau, 0.0))
        view = neurons.get(name)
        if not any(tau.any() for tau in trimmed):
            merged[name] = theta
        elif view is None:
            taus = torch.stack([tau.flatten() for tau in trimmed])
            merged[name] = merge_vector(theta.flatten(), taus, scale).reshape(theta.shape)
        else:
            taus = torch.stack([view.to_rows(tau) for tau in trimmed], dim=1)
            rows = [merge_neuron(*row, lambda_1, scale) for row in zip(view.to_rows(theta), taus, strict=True)]
            merged[name] = view.from_rows(torch.stack(rows), theta.shape)
    return merged, {"sigma": sigma, "sigma_t": sigma_t, "thresholds": thresholds, "lambda_2": scale}
