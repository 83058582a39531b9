"""The mathematics of NeuroMerging (Fang et al., arXiv:2503.05320) on plain tensors.

A *neuron* is one output unit of a weight: the vector of its incoming weights ``w_0``. Each expert's trimmed change of
the neuron (its *neuronal task vector* ``tau_t``) is split into a part parallel and a part orthogonal to ``w_0``, and
electing a sign in each part settles the conflicts between the tasks. With ``X = [w_0; tau_1; ..; tau_T]``, the small
Gram matrix ``G = X X^T`` holds every number that the method needs. The merged neuron is one linear combination of the
rows of ``X``, and nothing of the weight's own size is factorised.

The functions are pure, run on any device and need torch alone. Inputs are float32. The Gram matrix and its
eigenproblem are float64, because experts with much in common make the matrix nearly singular. The *energy* of a vector
is its squared norm.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 1e-10
"""Entries of the eigenvectors below this are rounding errors and count as exactly 0."""

NEGLIGIBLE_ENERGY = 1e-12
"""A task's orthogonal part, or a singular direction, with less than this share of the energy counts as absent."""

CANCELLATION = 1e-3
"""An orthogonal energy below this share of the task's energy is inaccurate: a difference of large float32 numbers."""

GRAM_ENTRIES = 1 << 18
"""How many numbers are converted to float64 at a time. The 2 MB that they take stay in a core's cache."""

ALIGNMENT = 64
"""All rows start at a multiple of this many bytes, because the start changes the last bit of a matrix product."""


@dataclass(frozen=True)
class Election:
    """The votes at some neurons and their results; all float64.

    Attributes:
        gram: (neurons, 1 + T, 1 + T), the Gram matrices; see `gram_matrix`.
        alpha: (neurons, T), the coordinates of the parallel parts.
        elected_alpha: (neurons,), the elected means of `alpha`.
        eigenvalues: (neurons, T), the squared singular values ``S_j^2`` of the stacked orthogonal parts.
        u: (neurons, T, T). Row t holds the coordinates of task t in units of ``S_j``, with 0 for absent parts.
        elected: (neurons, T), the elected means of the columns of `u`.
        coefficients: (neurons, 1 + T), the numbers ``a`` with ``merged neuron = w_0 + a @ X``.
    """

    gram: Tensor
    alpha: Tensor
    elected_alpha: Tensor
    eigenvalues: Tensor
    u: Tensor
    elected: Tensor
    coefficients: Tensor


Observer = Callable[[Election], object]


def trim(task_vector: Tensor, threshold: float, out: Tensor | None = None) -> Tensor:
    """Set the entries with ``|entry| < threshold`` to 0; entries equal to the threshold stay (paper, section 3.1).

    Args:
        task_vector: float32, any shape.
        threshold: the j-th smallest magnitude of the expert's whole task vector, a float32 value; 0 keeps everything.
        out: a tensor for the result, of the same shape; it is not used if the threshold is 0.

    Returns:
        The trimmed task vector: `out` or a new tensor, and `task_vector` itself if the threshold is 0.
    """
    if threshold == 0:
        return task_vector
    # hardshrink also zeroes entries equal to its bound, so the bound is the next float32 below the threshold.
    bound = torch.nextafter(torch.tensor(threshold, dtype=torch.float32), torch.tensor(0.0)).item()
    return torch.hardshrink(task_vector, bound, out=out)


def elect_mean(x: Tensor, dim: int, tie_sign: Tensor | None = None, rounding: float = 0.0) -> Tensor:
    """Elect the sign of the sum along `dim` and return the mean of the entries that have it.

    Entries that are exactly 0 have no sign and are not counted. If the sum is a tie (magnitude <= `rounding`), the sign
    is `tie_sign` (broadcast against the sum with `dim` kept). The result is 0 if `tie_sign` is missing or 0.
    """
    sign = elected_sign(x, dim, rounding)
    if tie_sign is not None:
        sign = torch.where(sign == 0, tie_sign, sign)
    agreeing = (x * sign).clamp_(min=0)
    return sign.squeeze(dim) * agreeing.sum(dim) / (agreeing > 0).sum(dim).clamp(min=1)


def elected_sign(x: Tensor, dim: int, rounding: float = 0.0) -> Tensor:
    """Return the sign (-1, 0, 1) of the sum along `dim`, which is kept. Sums of magnitude <= `rounding` have sign 0."""
    total = x.sum(dim, keepdim=True)
    return torch.where(total.abs() <= rounding, 0.0, total.sign())


def merge_neurons(
    x: Tensor, lambda_parallel: float, lambda_orthogonal: float, observe: Observer | None = None
) -> Tensor:
    """Merge every neuron: ``w_0 + lambda_1 psi_par + lambda_2 psi_orth`` (paper, section 3.2).

    Args:
        x: (neurons, 1 + T, n) float32; row 0 of each neuron is ``w_0``, rows 1..T are the trimmed task vectors.
        lambda_parallel: the paper's lambda_1.
        lambda_orthogonal: the paper's lambda_2.
        observe: called with the election.

    Returns:
        (neurons, n) float32. Every bit of a neuron depends on its own rows alone. A neuron that no task changes keeps
        its bits.

    Raises:
        FloatingPointError: if `x` holds a NaN or an infinity.
    """
    n = x.shape[2]
    x = _aligned(x)
    gram = gram_matrix(x)
    base = x[:, 0]
    election = hold_election(gram, lambda_parallel, lambda_orthogonal)
    if observe:
        observe(election)
    coefficients = election.coefficients.to(x.dtype)
    merged = torch.baddbmm(base.unsqueeze(1), coefficients.unsqueeze(1), x).squeeze(1)
    unchanged = (gram.diagonal(dim1=1, dim2=2)[:, 1:] == 0).all(1)
    if unchanged.any():
        merged[unchanged] = base[unchanged]
    return merged[:, :n]


def _aligned(x: Tensor) -> Tensor:
    """Pad the last dimension of `x` with zeros, so that a row's result does not depend on its place in memory."""
    missing = -x.shape[2] % (ALIGNMENT // x.element_size())
    x = torch.nn.functional.pad(x, (0, missing)) if missing else x
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def gram_matrix(x: Tensor) -> Tensor:
    """Return the inner products of each neuron's rows, (neurons, 1 + T, 1 + T) float64.

    Args:
        x: (neurons, 1 + T, n) float32; see `merge_neurons`.

    Raises:
        FloatingPointError: if `x` holds a NaN or an infinity.
    """
    batch = max(1, GRAM_ENTRIES // (x.shape[1] * x.shape[2]))
    buffer = torch.empty_like(x[:batch], dtype=torch.float64)
    exact = (buffer[: len(neurons)].copy_(neurons) for neurons in x.split(batch))
    gram = torch.cat([torch.bmm(neurons, neurons.mT) for neurons in exact])
    if not gram.isfinite().all():
        raise FloatingPointError("a weight is NaN or infinite")
    return gram


def decompose(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Split each neuron's task vectors into parallel and orthogonal parts, from inner products alone.

    Args:
        gram: (neurons, 1 + T, 1 + T) float64. Row and column 0 belong to ``w_0``.

    Returns:
        ``alpha`` (neurons, T), the coordinate of each task's parallel part ``alpha_t w_0`` (0 if ``w_0 = 0``), and
        ``P`` (neurons, T, T), the inner products of the orthogonal parts; both float64.
    """
    norm2 = gram[:, 0, 0, None]
    products = gram[:, 0, 1:]
    alpha = torch.where(norm2 > 0, products / norm2, 0.0)
    return alpha, gram[:, 1:, 1:] - alpha.unsqueeze(2) * products.unsqueeze(1)


def hold_election(gram: Tensor, lambda_parallel: float, lambda_orthogonal: float) -> Election:
    """Elect the parallel and the orthogonal part of each neuron, and find the coefficients of the merged neuron.

    The eigenvectors of ``P = U diag(S^2) U^T`` are the left singular vectors of the stacked orthogonal parts. Electing
    the mean of column j of ``U S`` and rebuilding along ``v_j`` cancels ``S_j``, which leaves
    ``psi_orth = sum_t c_t tau_orth,t`` with ``c = U elect_mean(U)``.

    Args:
        gram: (neurons, 1 + T, 1 + T) float64, see `gram_matrix`.
        lambda_parallel: the paper's lambda_1.
        lambda_orthogonal: the paper's lambda_2.
    """
    alpha, orthogonal = decompose(gram)
    elected_alpha = elect_mean(alpha, dim=1)
    eigenvalues, u = torch.linalg.eigh(orthogonal)
    energy = gram[:, 1:, 1:].diagonal(dim1=1, dim2=2)
    absent = orthogonal.diagonal(dim1=1, dim2=2) <= NEGLIGIBLE_ENERGY * energy
    u = torch.where(absent.unsqueeze(2) | (u.abs() < ROUNDING), 0.0, u)
    # A direction with singular value 0 has no coordinates, hence no vote on ties in the other directions.
    voting = eigenvalues > NEGLIGIBLE_ENERGY * eigenvalues[:, -1:]
    votes = elected_sign(u, dim=1, rounding=ROUNDING) * voting.unsqueeze(1)
    elected = elect_mean(u, dim=1, tie_sign=votes.sum(2, keepdim=True).sign(), rounding=ROUNDING)
    c = (u @ elected.unsqueeze(2)).squeeze(2)
    base_coefficient = lambda_parallel * elected_alpha - lambda_orthogonal * (c * alpha).sum(1)
    coefficients = torch.cat([base_coefficient.unsqueeze(1), lambda_orthogonal * c], dim=1)
    return Election(gram, alpha, elected_alpha, eigenvalues, u, elected, coefficients)


def merge_elementwise(base: Tensor, task_vectors: Tensor, lambda_orthogonal: float) -> Tensor:
    """Merge a parameter that is not neuronal (a bias, a norm, a gate) entry by entry.

    Args:
        base: (n,) float32.
        task_vectors: (T, n) float32, trimmed.
        lambda_orthogonal: the paper's lambda_2.

    Returns:
        (n,) float32. An entry that no task changes keeps its bits.

    Raises:
        FloatingPointError: if an input holds a NaN or an infinity.
    """
    change = lambda_orthogonal * elect_entries(task_vectors)
    if not (base.isfinite().all() and task_vectors.isfinite().all()):
        raise FloatingPointError("a weight is NaN or infinite")
    return torch.where(change == 0, base, (base.double() + change).float())


def elect_entries(task_vectors: Tensor) -> Tensor:
    """Return the elected mean of each entry: (n,) float64 from trimmed (T, n) float32.

    A tie takes the majority of the other entries' elected signs.
    """
    tasks = task_vectors.double()
    majority = elected_sign(tasks, dim=0).sum(1, keepdim=True).sign()
    return elect_mean(tasks, dim=0, tie_sign=majority)


def neuron_change(x: Tensor, lambda_parallel: float, lambda_orthogonal: float) -> Tensor:
    """Return what `merge_neurons` adds to ``w_0``, before the sum is rounded: (neurons, n) float32."""
    n = x.shape[2]
    x = _aligned(x)
    election = hold_election(gram_matrix(x), lambda_parallel, lambda_orthogonal)
    return torch.bmm(election.coefficients.to(x.dtype).unsqueeze(1), x).squeeze(1)[:, :n]


def low_rank_gram(base: Tensor, left: Tensor, right: Tensor, overlap: Tensor) -> Tensor:
    """Return what `gram_matrix` does, for task vectors in factors; see `merge_low_rank`.

    The products with ``w_0`` are those of float32, so the orthogonal part of a change that is almost parallel to
    ``w_0`` is inaccurate.
    """
    neurons, tasks, rank = left.shape
    exact = left.double()
    gram = base.new_empty(neurons, 1 + tasks, 1 + tasks, dtype=torch.float64)
    gram[:, 0, 0] = (base * base).sum(1)
    gram[:, 0, 1:] = ((base @ right.view(tasks * rank, -1).T).view(left.shape) * exact).sum(2)
    gram[:, 1:, 0] = gram[:, 0, 1:]
    for task in range(tasks):
        products = exact[:, task] @ overlap[task].view(rank, tasks * rank)
        gram[:, 1 + task, 1:] = (products.view(left.shape) * exact).sum(2)
    if not gram.isfinite().all():
        raise FloatingPointError("a weight is NaN or infinite")
    return gram


def merge_low_rank(
    base: Tensor,
    left: Tensor,
    right: Tensor,
    overlap: Tensor,
    lambda_parallel: float,
    lambda_orthogonal: float,
    observe: Observer | None = None,
) -> Tensor:
    """Merge neurons with the task vectors ``tau_t = left_t @ right_t``, without forming these vectors.

    The Gram matrix needs one product with ``w_0`` and the small overlaps of the right factors. The merged neuron needs
    one product with the right factors.

    Args:
        base: (neurons, n) float32.
        left: (neurons, T, r) float32. Factors of a lower rank are padded with zeros.
        right: (T, r, n) float32.
        overlap: (T, r, T, r) float64, the inner products of the rows of `right`.
        lambda_parallel: the paper's lambda_1.
        lambda_orthogonal: the paper's lambda_2.
        observe: called with the elections. Each neuron takes part in one of them.

    Returns:
        (neurons, n) float32. A neuron that no task changes keeps its bits.

    Raises:
        FloatingPointError: if an input holds a NaN or an infinity.
    """
    neurons, tasks, rank = left.shape
    rows = right.view(tasks * rank, -1)
    gram = low_rank_gram(base, left, right, overlap)
    # The float32 products with w_0 are too inaccurate for a small orthogonal part: merge such neurons explicitly.
    energy = gram.diagonal(dim1=1, dim2=2)[:, 1:]
    parallel = (decompose(gram)[1].diagonal(dim1=1, dim2=2) < CANCELLATION * energy).any(1)
    gram[parallel] = 0  # they take part in the election of `merge_neurons` below instead
    election = hold_election(gram, lambda_parallel, lambda_orthogonal)
    if observe:
        observe(election)
    coefficients = election.coefficients.to(base.dtype)
    change = (coefficients[:, 1:, None] * left).view(neurons, tasks * rank) @ rows
    merged = change.add_(base * coefficients[:, :1]).add_(base)
    unchanged = (energy == 0).all(1)
    if unchanged.any():
        merged[unchanged] = base[unchanged]
    if parallel.any():
        task_vectors = torch.einsum("ktr,trn->ktn", left[parallel], right)
        x = torch.cat([base[parallel].unsqueeze(1), task_vectors], dim=1)
        merged[parallel] = merge_neurons(x, lambda_parallel, lambda_orthogonal, observe)
    return merged
