"""The mathematics of methods that merge the matrix of a linear layer as a whole, on plain tensors.

*Iso* (Marczak et al., arXiv:2502.04959) sums the task vectors and gives all singular values of the sum their mean.
*TSV-M* (Gargiulo et al., arXiv:2412.00081) keeps each task's largest singular triples and decorrelates their singular
vectors. Both need singular vectors. A sum of LoRA adapters has them in a small core, between the orthonormal bases of
its stacked factors. Of a full matrix, they are eigenvectors of the Gram matrix of its shorter side in float64. That is
as fast as a float32 SVD, and accurate for singular values down to 1e-6 of the largest.

The functions are pure, run on any device and need torch alone. Inputs and results are float32.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

NUMERICAL_RANK = 1e-3
"""Singular values up to this share of the largest one do not count in the numerical rank of a sum of task vectors."""

NEGLIGIBLE = 1e-6
"""Singular values up to this share of the largest one count as 0."""

KRYLOV_BLOCK, KRYLOV_TOLERANCE = 16, 1e-6
"""The number of vectors of a Krylov step, and the relative gain of a step after which no other one follows.

MKL's products with 8 vectors take longer than those with 16.
"""

GRAM_ENTRIES = 1 << 20
"""How many numbers are converted to float64 at a time."""

PANEL = 256
"""How many rows of a symmetric product are computed at a time, from the diagonal on. Of n^2 entries, about half are."""


RANGE_PROBES, PROBES = 16, 24
"""The random vectors of `effective_rank`: how many find the largest singular directions, and how many there are."""


def make_probes(width: int, device: torch.device) -> Tensor:
    """Return the random vectors of `effective_rank`, always the same: (width, PROBES) float32."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(width, PROBES, generator=generator).to(device)


def effective_rank(energy: float, probes: Tensor, products: Tensor) -> float | None:
    """Estimate ``(sum s^2)^2 / sum s^4`` over the singular values s of a matrix M that is seen once, in parts.

    The first probes give an approximation of ``M^T M`` that is exact up to their rank (Nystrom), and the others
    estimate what it lacks, as in Persson, Cortinovis and Kressner, "Improved variants of the Hutch++ algorithm" (2022).

    Args:
        energy: ``sum s^2``, the squared norm of M.
        probes: see `make_probes`.
        products: (width, PROBES), ``M^T M @ probes``.

    Returns:
        The effective rank; None for M = 0.
    """
    if not energy > 0:
        return None
    z, y = probes.double().cpu(), products.double().cpu() / energy
    core = z[:, :RANGE_PROBES].T @ y[:, :RANGE_PROBES]
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    kept = values > 1e-5 * values[-1]
    root = y[:, :RANGE_PROBES] @ (vectors[:, kept] / values[kept].sqrt())
    found = (root.T @ root).square().sum()
    rest = y[:, RANGE_PROBES:].square().sum() - (root @ (root.T @ z[:, RANGE_PROBES:])).square().sum()
    return max(1.0, 1 / (found + max(rest / (PROBES - RANGE_PROBES), 0.0)).item())


@dataclass(frozen=True)
class Factors:
    """A matrix in factors, ``left @ right``.

    Attributes:
        left: (rows, r) float32.
        right: (r, columns) float32.
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the product."""
        return self.left.shape[0], self.right.shape[1]

    def times(self, scale: float) -> "Factors":
        """Return the matrix times a number."""
        smaller = self.left.numel() < self.right.numel()
        return Factors(self.left * scale, self.right) if smaller else Factors(self.left, self.right * scale)


@dataclass(frozen=True)
class Triples:
    """Singular triples of a matrix, the largest first.

    Attributes:
        u: (rows, r) float64, the left singular vectors.
        s: (r,) float64, the singular values, above 0.
        vh: (r, columns) float64, the right singular vectors.
    """

    u: Tensor
    s: Tensor
    vh: Tensor


def singular_triples(matrix: Tensor | Factors, most: int | None = None, cutoff: float = NEGLIGIBLE) -> Triples:
    """Return the singular triples of a matrix, the largest first.

    Args:
        matrix: (rows, columns) float32, or its factors.
        most: the largest number of triples; None for all.
        cutoff: triples with a singular value up to this share of the largest one are left out.
    """
    if isinstance(matrix, Factors):
        u_basis, u_core = torch.linalg.qr(matrix.left.double())
        v_basis, v_core = torch.linalg.qr(matrix.right.T.double())
        u, s, vh = torch.linalg.svd(u_core @ v_core.T, full_matrices=False)
        count = _count(s, most, cutoff)
        return Triples(u_basis @ u[:, :count], s[:count], vh[:count] @ v_basis.T)
    if matrix.shape[0] < matrix.shape[1]:
        found = singular_triples(matrix.T, most, cutoff)
        return Triples(found.vh.T, found.s, found.u.T)
    values, vectors = _gram_eigenvectors(matrix)
    s = values.clamp(min=0).sqrt()
    count = _count(s, most, cutoff)
    s, v = s[:count], vectors[:, :count]
    return Triples(matrix.double() @ (v / s), s, v.T)


def spectral_norm(matrix: Tensor | Factors) -> float:
    """Return the largest singular value of a matrix, to about five digits.

    Of a full matrix it is found in a Krylov space (block Lanczos), which takes a few products with narrow matrices.

    Args:
        matrix: (rows, columns) float32, or its factors.
    """
    if isinstance(matrix, Factors):
        return singular_triples(matrix, most=1).s.sum().item()
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    columns = tall.shape[1]
    vectors = torch.randn(columns, KRYLOV_BLOCK, generator=torch.Generator().manual_seed(0)).to(matrix.device)
    basis, images, found = vectors[:, :0], tall[:, :0], 0.0
    while basis.shape[1] < columns:
        vectors = vectors[:, : columns - basis.shape[1]]
        for _ in range(2):  # once leaves rounding errors, which are all there is beyond the rank of the matrix
            vectors, _ = torch.linalg.qr(vectors - basis @ (basis.T @ vectors))
        basis, images = torch.cat([basis, vectors], 1), torch.cat([images, tall @ vectors], 1)
        value = torch.linalg.eigvalsh(images.double().T @ images.double())[-1].clamp(min=0).sqrt().item()
        if value - found <= KRYLOV_TOLERANCE * value:
            return value
        found, vectors = value, tall.T @ images[:, -KRYLOV_BLOCK:]
    return found


def with_spectrum(matrix: Tensor | Factors, rule: Callable[[Tensor], Tensor]) -> Factors:
    """Replace the singular values of a matrix ``U S V^T`` within its numerical rank r, and drop the others.

    Iso (section 4.1) gives all of them their mean, also those of directions in which no task changes anything. In a
    sum of LoRA adapters these directions are arbitrary.

    Args:
        matrix: (rows, columns) float32, or its factors.
        rule: returns the new singular values for the r old ones, the largest first; both (r,) float64. It is not
            called if r is 0.

    Returns:
        ``U_r rule(S_r) V_r^T``, in factors.
    """
    if isinstance(matrix, Factors):
        triples = singular_triples(matrix, cutoff=NUMERICAL_RANK)
        scaled = triples.u * rule(triples.s) if len(triples.s) else triples.u
        return Factors(scaled.float(), triples.vh.float())
    if matrix.shape[0] < matrix.shape[1]:
        transposed = with_spectrum(matrix.T, rule)
        return Factors(transposed.right.T, transposed.left.T)
    values, vectors = _gram_eigenvectors(matrix)
    s = values.clamp(min=0).sqrt()
    count = _count(s, None, NUMERICAL_RANK)
    s, v = s[:count], vectors[:, :count]
    weights = v * (rule(s) / s) if count else v
    whole = torch.zeros(len(v), len(v), dtype=torch.float64, device=v.device)
    _add_upper(whole, weights, v)
    return Factors(matrix, (whole.triu() + whole.triu(1).T).float())


def decorrelated(tasks: Iterable[Tensor | Factors], experts: int) -> Factors:
    """Merge task matrices by their singular vectors (TSV-M, section 4.3 of its paper).

    Each task gives its largest ``floor(min(rows, columns) / experts)`` triples, but at least one. The singular vectors
    of all tasks are made orthonormal, by the nearest matrix with orthonormal columns, and put together with the
    singular values.

    Args:
        tasks: the task vectors: (rows, columns) float32, or their factors. They are taken one at a time.
        experts: the number of all experts.

    Returns:
        The merged matrix, in factors.
    """
    triples = [singular_triples(task, max(1, min(task.shape) // experts)) for task in tasks]
    u = torch.cat([each.u for each in triples], 1)
    s = torch.cat([each.s for each in triples])
    vh = torch.cat([each.vh for each in triples])
    core = _inverse_root(u.T @ u) @ (s.unsqueeze(1) * _inverse_root(vh @ vh.T))
    return Factors((u @ core).float(), vh.float())


def _gram_eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, the largest first, and the eigenvectors of ``matrix^T matrix`` in float64."""
    columns = matrix.shape[1]
    gram = torch.zeros(columns, columns, dtype=torch.float64, device=matrix.device)
    for rows in matrix.split(max(1, GRAM_ENTRIES // max(1, columns))):
        exact = rows.double().T
        _add_upper(gram, exact, exact)
    values, vectors = torch.linalg.eigh(gram, UPLO="U")
    return values.flip(0), vectors.flip(1)


def _add_upper(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the upper triangle of the symmetric matrix ``left @ right^T``, and some entries beside it."""
    for start in range(0, len(total), PANEL):
        stop = start + PANEL
        total[start:stop, start:].addmm_(left[start:stop], right[start:].T)


def _inverse_root(gram: Tensor) -> Tensor:
    """Return ``G^(-1/2)`` of a Gram matrix on its range, by which vectors become orthonormal: (n, n) float64."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > NEGLIGIBLE**2 * values[-1:]
    return (vectors[:, kept] * values[kept].rsqrt()) @ vectors[:, kept].T


def _count(s: Tensor, most: int | None, cutoff: float) -> int:
    """Return how many of the descending singular values to keep."""
    found = int((s > cutoff * s[:1]).sum())
    return found if most is None else min(found, most)
