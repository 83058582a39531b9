"""PCB-Merging (Du et al., "Parameter Competition Balancing for Model Merging", NeurIPS 2024, arXiv:2410.02396).

The paper does not define its Norm(.), so this follows the authors' code, to which the paper refers for details
(github.com/duguodong7/pcb-merging, pcb-merging.py). Each entry of a task vector gets a score: intra-balancing (how
large it is within its task) times inter-balancing (how much the other tasks agree). Entries with low scores are
dropped, and the scores weight the other entries.

For each task, the method needs numbers of the whole model: two extreme magnitudes, the threshold of the scores, and the
largest score. All are exact and found by streaming. Where the definition divides 0 by 0 (a task vector of equal
magnitudes), the quotient is 0. Scores below 0 count as 0. The definition gives them a weight only if `density` exceeds
the share of the other scores, which is more than half.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neuromerge_hf.config import MergeConfig, check_density, check_number
from neuromerge_hf.engine.method import Method, Recorder, add_change, summed
from neuromerge_hf.engine.trimming import Rank, Trimming, trim_rank
from neuromerge_hf.options import option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from neuromerge_hf.engine.passes import Passes
    from neuromerge_hf.sources.unit import Unit
    from neuromerge_hf.storage.layout import Block

EXTREME = 1e-4
"""Magnitudes are clamped to the range between this quantile and 1 minus this quantile."""

SMALLEST_DIVISOR = 1e-12
"""The smallest divisor of a weighted sum: the sum of the weights is raised to it."""


@dataclass(frozen=True)
class PCBConfig(MergeConfig):
    """The hyper-parameters of PCB-Merging (Du et al., arXiv:2410.02396). The defaults are from the authors' code.

    Args:
        density: the fraction of each task vector's entries, with the highest scores, that is kept: the paper's mask
            ratio r.
        scale: the paper's lambda, the weight of the merged task vector.
        exclude: names of parameters to copy from the base, as shell patterns.

    Examples:
        >>> merge(["math", "code-lora"], "merged", base_model="base", config=PCBConfig(density=0.2)).method
        'pcb'
    """

    method = "pcb"
    title = "PCB-Merging"
    paper = "https://arxiv.org/abs/2410.02396"
    summary = """\
PCB-Merging (Du et al., NeurIPS 2024) takes what each fine-tune changed in the base, its task vector, and scores each
entry by how large it is and how much the others agree. Entries of a low score are dropped; the scores weight the
others."""

    density: float = option(0.1, "the fraction of each task vector that is kept")
    scale: float = option(1.0, "the weight of the merged task vector")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self.density)
        check_number("scale", self.scale)

    @property
    def passes(self) -> int:
        return 4  # two for the extreme magnitudes, one for the scores


@dataclass(frozen=True)
class Balance:
    """The numbers that PCB-Merging needs of one expert's whole task vector.

    Attributes:
        low, high: the limits to which the magnitudes are clamped.
        threshold: the score up to which entries are dropped.
        highest: the largest score.
    """

    low: float
    high: float
    threshold: float = 0.0
    highest: float = 0.0


def intra_balancing(task_vector: Tensor, low: float, high: float, tasks: int) -> Tensor:
    """Return ``exp(T * m^2)``, where m is the clamped magnitude as a share of [low, high] and T the number of tasks."""
    share = task_vector.abs().clamp_(low, high).sub_(low).mul_(1 / (high - low) if high > low else 0.0)
    return share.square_().mul_(tasks).exp_()


def inter_balancing(task_vector: Tensor, total: Tensor) -> Tensor:
    """Return ``tanh(tau_t * sum_s tau_s)``."""
    return (task_vector * total).tanh_()


def score(task_vector: Tensor, total: Tensor, balance: Balance, tasks: int) -> Tensor:
    """Return the product of both balancings, or 0 if it is negative. `tasks` is the number of all experts."""
    intra = intra_balancing(task_vector, balance.low, balance.high, tasks)
    return intra.mul_(inter_balancing(task_vector, total)).clamp_(min=0).abs_()  # -0.0 has other bits than 0.0


def balanced_mean(task_vectors: Tensor, balances: Sequence[Balance], tasks: int) -> Tensor:
    """Return the mean of the clamped task vectors, weighted by their scores: (...) float32.

    Args:
        task_vectors: (T, ...) float32, the task vectors of the experts that change the parameter.
        balances: the balance of each of these T experts.
        tasks: the number of all experts.
    """
    total = summed(task_vectors)
    merged, weights = total.new_zeros(total.shape), total.new_zeros(total.shape)
    for task_vector, balance in zip(task_vectors, balances, strict=True):
        spread = balance.highest - balance.threshold
        weight = score(task_vector, total, balance, tasks).sub_(balance.threshold).clamp_(min=0)
        weight.mul_(1 / spread if spread > 0 else 0.0)
        clamped = task_vector.abs().clamp_(balance.low, balance.high).mul_(task_vector.sign())
        merged.addcmul_(clamped, weight)
        weights += weight
    return merged.div_(weights.clamp_(min=SMALLEST_DIVISOR))


class PCB(Method[PCBConfig], config=PCBConfig):
    """PCB-Merging with the balances of the experts."""

    def __init__(self, config: PCBConfig, trimmings: list[Trimming], balances: list[Balance]):
        super().__init__(config, trimmings)
        self.balances = balances

    @classmethod
    def fit(cls, config: PCBConfig, passes: Passes) -> PCB:
        from neuromerge_hf.engine.thresholds import find_ranked

        entries = passes.work.entries
        # The authors count from 0: sorted[int(n * EXTREME)] and sorted[int(n * (1 - EXTREME) - 1)].
        lowest = [Rank(t, min(int(n * EXTREME) + 1, n)) for t, n in enumerate(entries)]
        highest = [Rank(t, min(int(n * (1 - EXTREME) - 1) + 1, n)) for t, n in enumerate(entries)]
        found = find_ranked(passes, lowest + highest)
        limits = zip(found[: len(entries)], found[len(entries) :], strict=True)
        extremes = [Balance(low.threshold, high.threshold) for low, high in limits]

        scores = _Scores(extremes)
        ranks = [Rank(t, min(trim_rank(n, config.density) + 1, n)) for t, n in enumerate(entries)]
        trimmings = find_ranked(passes, ranks, scores)
        balances = [
            Balance(extreme.low, extreme.high, trimming.threshold, highest)
            for extreme, trimming, highest in zip(extremes, trimmings, scores.highest, strict=True)
        ]
        return cls(config, trimmings, balances)

    def merge_block(self, x: Tensor, unit: Unit, block: Block, record: Recorder) -> Tensor:
        change = balanced_mean(x[1:], [self.balances[expert] for expert in unit.changing], len(self.balances))
        return add_change(x[0], change.mul_(self.config.scale))


class _Scores:
    """Replaces the task vectors with their scores (see `Values`), and records each expert's highest score."""

    def __init__(self, extremes: list[Balance]):
        self.highest = [0.0] * len(extremes)
        self._extremes = extremes
        self._lock = threading.Lock()

    def __call__(self, x: Tensor, unit: Unit, block: Block) -> None:
        total = summed(x[1:])
        for task_vector, expert in zip(x[1:], unit.changing, strict=True):
            task_vector.copy_(score(task_vector, total, self._extremes[expert], len(self._extremes)))
            highest = task_vector.max().item()
            with self._lock:
                self.highest[expert] = max(self.highest[expert], highest)
