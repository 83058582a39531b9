"""lambda_2 by length: a rule of ours, not the paper's, that looks at what is added to the base and not at the trimming.

Merged task vectors of the same length do about equally well, whatever the density, and 1.4 times the length of an
expert's is best or near it for two to six experts (benchmarks/quality, "Open questions"). The paper's rule arrives
there at density 0.2, is too large below it, and too small above.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from neuromerge_hf.engine.merge import BlockMerger, Item
from neuromerge_hf.engine.method import Config, Method
from neuromerge_hf.engine.passes import map_in_order
from neuromerge_hf.engine.statistics import BlockStatistics, InterferenceTotals
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.layout import Block

DIGITS = 6
"""The sums' last bits depend on the size of the blocks; lambda_2 shall not."""


def lambda_by_length(lengths: Tensor, products: Tensor, merged: float) -> float:
    """lambda_2 such that the merged task vector is ``sqrt(2 - c)`` times as long as the experts' are on average.

    c is the mean cosine between two of them, or 0 where that is negative: experts that are orthogonal to each other
    give 1.4 times their length, experts that agree give their own, and one alone gives lambda_2 = 1.

    Args:
        lengths: (T,), the norms of the task vectors before trimming; those of length 0 do not count.
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


def find_lambda_by_length(
    plan: MergePlan, method: Method[Config], device: torch.device, threads: int, advance: Callable[[int], object]
) -> float:
    """lambda_2 by length, from one more pass over what a plan merges.

    Args:
        method: NeuroMerging with lambda_1 = lambda_2 = 1.
        advance: called with the number of bytes that have been read.

    Raises:
        MergeError: if a weight is NaN or infinite.
    """
    merger = BlockMerger(plan, method, device)

    def measure(item: Item) -> tuple[Unit, Block, Tensor, list[BlockStatistics]]:
        unit, block, factors = item
        sums: list[BlockStatistics] = []
        energies: list[Tensor] = []
        merger.merge(item, sums.append, lambda x: energies.append(_energy(x)))
        if factors:  # which are not trimmed
            energies = [found.gram.diagonal()[1:] for found in sums]
        return unit, block, torch.stack(energies).sum(0), sums

    experts = len(plan.experts)
    total, squares = InterferenceTotals(experts), torch.zeros(experts, dtype=torch.float64)
    units = (unit for unit in plan.units if unit.task_vectors)
    for unit, block, energy, found in map_in_order(measure, merger.items(units), threads):
        squares[unit.changing] += energy
        for sums in found:
            total.add(sums, unit.changing, unit.layout.width)
        advance(unit.bytes_read * len(block) // unit.layout.rows)
    return lambda_by_length(squares.sqrt(), total.products, total.merged.sqrt().item())


def _energy(x: Tensor) -> Tensor:
    """The squared norms of the task vectors x[1:] of a block, (T,) float64 on the CPU."""
    return torch.linalg.vector_norm(x[1:], dim=(1, 2), dtype=torch.float64).square().cpu()
