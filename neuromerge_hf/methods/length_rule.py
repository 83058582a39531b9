"""lambda_2 by length: a rule of this library, not of the paper, that sets the length of the merged task vector.

At any density, merged task vectors of the same length perform about equally well. 1.4 times the length of an expert's
task vector is best, or near the best, for two to six experts (benchmarks/quality, "Open questions"). The paper's rule
gives this length at density 0.2, a larger one at lower densities, and a smaller one at higher densities.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from neuromerge_hf.engine.block_statistics import BlockStatistics
from neuromerge_hf.engine.merge import UnitMerger
from neuromerge_hf.engine.method import Method
from neuromerge_hf.engine.passes import Passes
from neuromerge_hf.engine.statistics import InterferenceTotals
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.layout import Block

Measured = tuple[Tensor, list[BlockStatistics]]
"""The squared norms of a block's untrimmed task vectors, (T,) float64, and the sums of its elections."""

DIGITS = 6
"""lambda_2 is rounded to this many digits, because the last bits of the sums depend on the size of the blocks."""


def lambda_by_length(lengths: Tensor, products: Tensor, merged: float) -> float:
    """Return the lambda_2 that makes the merged task vector ``sqrt(2 - c)`` times as long as the experts' on average.

    c is the mean cosine between two task vectors, or 0 if the mean is negative. Orthogonal experts give 1.4 times their
    length, experts that agree give their own length, and a single expert gives lambda_2 = 1.

    Args:
        lengths: (T,), the norms of the task vectors before trimming. Task vectors of length 0 do not count.
        products: (T, T), the inner products of the trimmed task vectors.
        merged: the norm of the merged task vector at lambda_1 = lambda_2 = 1.
    """
    norms = products.diagonal().clamp(min=0).sqrt()
    changing = norms > 0
    if not merged > 0:
        return 1.0
    cosines = (products / norms.outer(norms))[changing][:, changing]
    pairs = cosines[torch.ones_like(cosines).triu(1) > 0]
    cosine = min(1.0, max(0.0, pairs.mean().item())) if len(pairs) else 1.0
    return float(f"{math.sqrt(2 - cosine) * lengths[changing].mean().item() / merged:.{DIGITS}g}")


def find_lambda_by_length(passes: Passes, method: Method[Any]) -> float:
    """Find lambda_2 by length, in one more pass over the units that are merged.

    Args:
        passes: how the inputs are read.
        method: NeuroMerging with lambda_1 = lambda_2 = 1.

    Raises:
        MergeError: if a weight is NaN or infinite.
    """

    def start(unit: Unit) -> tuple[Iterable[Block], Callable[[Block], Measured]]:
        merger = UnitMerger(passes, method, unit)

        def measure(block: Block) -> Measured:
            sums: list[BlockStatistics] = []
            energies: list[Tensor] = []
            merger.merge(block, sums.append, lambda x: energies.append(_energy(x)))
            if merger.factors:  # task vectors are not formed, nor trimmed, so the Gram matrix has their norms
                energies = [found.gram.diagonal()[1:] for found in sums]
            return torch.stack(energies).sum(0), sums

        return merger.blocks(), measure

    experts = len(passes.work.expert_names)
    total, squares = InterferenceTotals(experts), torch.zeros(experts, dtype=torch.float64)
    for unit, results in passes.run(start, [unit for unit in passes.work.merged if not unit.by_matrix]):
        for energy, sums in results:
            squares[unit.changing] += energy
            for found in sums:
                total.add(found, unit.changing, unit.layout.width)
    return lambda_by_length(squares.sqrt(), total.products, total.merged.sqrt().item())


def _energy(x: Tensor) -> Tensor:
    """Return the squared norms of the task vectors x[1:] of a block: (T,) float64 on the CPU."""
    return torch.linalg.vector_norm(x[1:], dim=(1, 2), dtype=torch.float64).square().cpu()
