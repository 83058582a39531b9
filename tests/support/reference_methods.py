"""Direct implementations of the other methods, on whole flattened models in float64.

It shares no code with the package. Each task vector is one long vector over the parameters that its expert may change,
as in the papers. Entries that an expert cannot change are 0 and do not count in its quantiles.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reference import Neurons, threshold

State = dict[str, Tensor]


class Flat:
    """Task vectors (T, D) float32 of whole models, and the entries that each expert may change, (T, D) bool."""

    def __init__(self, base: State, experts: list[State]):
        self.names = sorted(name for name, tensor in base.items() if tensor.is_floating_point())
        self.base = {name: base[name] for name in self.names}
        rows, owned = [], []
        for expert in experts:
            parts = [
                expert[name].float() - theta.float() if name in expert else torch.zeros(theta.shape)
                for name, theta in self.base.items()
            ]
            rows.append(torch.cat([part.flatten() for part in parts]))
            owned.append(torch.cat([torch.full(t.shape, n in expert).flatten() for n, t in self.base.items()]))
        self.owned = torch.stack(owned)
        self.task_vectors = torch.stack(rows)  # float32, because thresholds are float32 numbers

    def merged(self, change: Tensor) -> State:
        """The state of the base plus a merged task vector (D,), in float64."""
        sizes = [theta.numel() for theta in self.base.values()]
        return {
            name: theta.double() + part.view(theta.shape)
            for (name, theta), part in zip(self.base.items(), change.double().split(sizes), strict=True)
        }


def average(flat: Flat, weights: list[float] | None = None) -> Tensor:
    shares = shares_of(flat, weights)
    return shares / shares.sum() @ flat.task_vectors.double()


def shares_of(flat: Flat, weights: list[float] | None) -> Tensor:
    """The weights of the experts, (T,) float64."""
    return torch.tensor(weights or [1.0] * len(flat.task_vectors), dtype=torch.float64)


def task_arithmetic(flat: Flat, scale: float, weights: list[float] | None = None) -> Tensor:
    return scale * (shares_of(flat, weights) @ flat.task_vectors.double())


def trimmed(task_vectors: Tensor, owned: Tensor, density: float) -> Tensor:
    cuts = [threshold([row[own]], density) for row, own in zip(task_vectors, owned, strict=True)]
    return torch.stack([torch.where(row.abs() >= cut, row, 0.0) for row, cut in zip(task_vectors, cuts, strict=True)])


def ties(flat: Flat, density: float, scale: float, weights: list[float] | None = None) -> Tensor:
    tau = trimmed(flat.task_vectors, flat.owned, density).double()
    return scale * elect_and_merge(tau, shares_of(flat, weights))


def elect_and_merge(tau: Tensor, weights: Tensor) -> Tensor:
    elected = (weights @ tau).sign()
    chosen = ((tau.sign() == elected) & (elected != 0)).double()
    total = weights @ chosen
    return (weights @ (tau * chosen)) / total.where(total > 0, 1.0)


def dare_ties(
    flat: Flat,
    neurons: Mapping[str, Neurons | None],
    drop_rate: float,
    density: float,
    scale: float,
    seed: int,
    weights: list[float] | None = None,
) -> Tensor:
    rows = []
    for t, row in enumerate(flat.task_vectors):
        kept = []
        for name, theta in flat.base.items():
            key = np.frombuffer(hashlib.sha256(f"{seed} {t} {name}".encode()).digest()[:16], dtype="<u8")
            numbers = np.random.Philox(key=key).random_raw(theta.numel())
            stays = torch.tensor([int(number) / 2**64 >= drop_rate for number in numbers])
            view = neurons.get(name)
            kept.append(view.from_rows(stays.view(view.to_rows(theta).shape), theta.shape) if view else stays)
        mask = torch.cat([stays.flatten() for stays in kept])
        rows.append(torch.where(mask, row * (1 / (1 - drop_rate)), 0.0))
    tau = trimmed(torch.stack(rows), flat.owned, density).double()
    return scale * elect_and_merge(tau, shares_of(flat, weights))


def pcb(flat: Flat, density: float, scale: float) -> Tensor:
    tau = flat.task_vectors.double()
    tasks = len(tau)
    total = tau.sum(0)
    merged, weights = torch.zeros_like(total), torch.zeros_like(total)
    for row, own in zip(tau, flat.owned, strict=True):
        magnitudes = row[own].abs().sort().values
        n = len(magnitudes)
        low, high = magnitudes[int(n * 0.0001)], magnitudes[int(n * (1 - 0.0001) - 1)]
        clamped = row.abs().clamp(low, high)
        intra = torch.exp(tasks * ((clamped - low) / (high - low)) ** 2)
        beta = intra * torch.tanh(row * total)
        scores = beta[own].sort().values
        cut = scores[math.floor((1 - Fraction(str(density))) * n)]
        weight = torch.where(own, (beta.clamp(min=cut) - cut) / (scores[-1] - cut), 0.0)
        merged += weight * clamped * row.sign()
        weights += weight
    return scale * merged / weights.clamp(min=1e-12)


Matrices = Mapping[str, int]
"""The parameters that hold matrices of linear layers, each with the number of its matrices."""


def flattened(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The singular vectors of a float64 matrix within its numerical rank, put together, and the singular values."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = s > 1e-3 * s[0]
    return u[:, kept] @ vh[kept], s[kept]


def decorrelated(tasks: list[Tensor], experts: int) -> Tensor:
    """TSV-M of float64 matrices."""
    most = max(1, min(tasks[0].shape) // experts)
    triples = []
    for task in tasks:
        u, s, vh = torch.linalg.svd(task, full_matrices=False)
        kept = (s > 1e-6 * s[0]) & (torch.arange(len(s)) < most)
        triples.append((u[:, kept], s[kept], vh[kept]))
    u, s, vh = (torch.cat(parts, dim) for parts, dim in zip(zip(*triples, strict=True), (1, 0, 0), strict=True))
    return polar(u) @ torch.diag(s) @ polar(vh)


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = s > 1e-6 * s[0]
    return u[:, kept] @ vh[kept]


def by_matrix(flat: Flat, matrices: Matrices, others: Tensor, merge: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """The merged task vector whose matrices are `merge` of the tasks' and whose other entries are those of `others`."""
    merged = others.clone()
    start = 0
    for name, theta in flat.base.items():
        entries = slice(start, start + theta.numel())
        start = entries.stop
        if name in matrices and flat.task_vectors[:, entries].any():
            tasks = flat.task_vectors[:, entries].double().view(-1, matrices[name], *_shape(theta, matrices[name]))
            merged[entries] = torch.cat([merge(list(each)).flatten() for each in tasks.transpose(0, 1)])
    return merged


def _shape(theta: Tensor, count: int) -> tuple[int, int]:
    return theta.numel() // count // theta.shape[-1], theta.shape[-1]


def iso_c(flat: Flat, matrices: Matrices, scale: float) -> Tensor:
    def merge(tasks: list[Tensor]) -> Tensor:
        directions, values = flattened(torch.stack(tasks).sum(0))
        return scale * values.mean() * directions

    return by_matrix(flat, matrices, scale * average(flat), merge)


def tsv(flat: Flat, matrices: Matrices, scale: float) -> Tensor:
    def merge(tasks: list[Tensor]) -> Tensor:
        return scale * decorrelated([task for task in tasks if task.any()], len(tasks))

    return by_matrix(flat, matrices, scale * average(flat), merge)


def neuro_iso(flat: Flat, matrices: Matrices, others: State, scale: float) -> Tensor:
    """`others` is the model that NeuroMerging gives."""

    def merge(tasks: list[Tensor]) -> Tensor:
        tasks = [task for task in tasks if task.any()]
        strength = sum(torch.linalg.svdvals(task)[0] for task in tasks) / len(tasks)
        gram = torch.tensor([[(one * other).sum() for other in tasks] for one in tasks])
        share = 2 ** -((gram.trace() ** 2 / (gram @ gram).trace() - 1) ** 2)
        u, s, vh = torch.linalg.svd(torch.stack(tasks).sum(0), full_matrices=False)
        kept = s > 1e-3 * s[0]
        values = strength * (share * s / s[0] + (1 - share) * scale)
        return u[:, kept] @ torch.diag(values[kept]) @ vh[kept]

    change = torch.cat([(others[name].double() - theta.double()).flatten() for name, theta in flat.base.items()])
    return by_matrix(flat, matrices, change, merge)


METHODS: dict[str, Callable[..., Any]] = {
    "average": average,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare_ties": dare_ties,
    "pcb": pcb,
    "iso_c": iso_c,
    "tsv": tsv,
    "neuro_iso": neuro_iso,
}
