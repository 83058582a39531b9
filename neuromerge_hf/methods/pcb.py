"""PCB-Merging (Du et al., "Parameter Competition Balancing for Model Merging", NeurIPS 2024, arXiv:2410.02396).

The paper leaves open what its Norm(.) is, so this follows the authors' code, to which the paper refers for the details
(github.com/duguodong7/pcb-merging, pcb-merging.py). Each entry of a task vector gets a score: intra-balancing (how
large it is within its task) times inter-balancing (how much the other tasks agree). Low scores are dropped, and what is
left weights the entries of the task vectors.

Three things of the whole model are needed for each task: two extreme magnitudes, the threshold of the scores, and the
largest score; all are exact, found by streaming. Where the definition divides 0 by 0 (a task vector of equal
magnitudes) the quotient is 0. Scores below 0 count as 0: the definition gives them a weight only where `density` is
larger than the share of the other scores, which is more than half.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuromerge_hf.config import PCBConfig
from neuromerge_hf.engine.histogram import Rank, Trimming
from neuromerge_hf.engine.method import Method, Recorder, add_change, summed
from neuromerge_hf.engine.thresholds import count_entries, find_ranked, trim_rank
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.layout import Block

EXTREME = 1e-4
"""Magnitudes below this quantile are raised to it, and those above one minus it are lowered."""

SMALLEST_SUM = 1e-12
"""Of the weights that an entry's tasks are divided by."""


@dataclass(frozen=True)
class Balance:
    """What PCB-Merging needs to know of one expert's whole task vector.

    Attributes:
        low, high: between which its magnitudes are clamped.
        threshold: scores up to this one are dropped.
        highest: the largest score.
    """

    low: float
    high: float
    threshold: float = 0.0
    highest: float = 0.0


def intra_balancing(task_vector: Tensor, low: float, high: float, tasks: int) -> Tensor:
    """``exp(T * m^2)``, where m is the clamped magnitude as a share of its range."""
    share = task_vector.abs().clamp_(low, high).sub_(low).mul_(1 / (high - low) if high > low else 0.0)
    return share.square_().mul_(tasks).exp_()


def inter_balancing(task_vector: Tensor, total: Tensor) -> Tensor:
    """``tanh(tau_t * sum_s tau_s)``."""
    return (task_vector * total).tanh_()


def score(task_vector: Tensor, total: Tensor, balance: Balance, tasks: int) -> Tensor:
    """The product of both, not below 0. `tasks` is the number T of all experts."""
    intra = intra_balancing(task_vector, balance.low, balance.high, tasks)
    return intra.mul_(inter_balancing(task_vector, total)).clamp_(min=0)


def balanced_mean(task_vectors: Tensor, balances: Sequence[Balance], tasks: int) -> Tensor:
    """The mean of the clamped task vectors, weighted by their scores: (...) from (T, ...) float32.

    Args:
        balances: of the experts whose task vectors these are.
        tasks: how many experts there are in all.
    """
    total = summed(task_vectors)
    merged, weights = torch.zeros_like(total), torch.zeros_like(total)
    for task_vector, balance in zip(task_vectors, balances, strict=True):
        spread = balance.highest - balance.threshold
        weight = score(task_vector, total, balance, tasks).sub_(balance.threshold).clamp_(min=0)
        weight.mul_(1 / spread if spread > 0 else 0.0)
        clamped = task_vector.abs().clamp_(balance.low, balance.high).mul_(task_vector.sign())
        merged.addcmul_(clamped, weight)
        weights += weight
    return merged.div_(weights.clamp_(min=SMALLEST_SUM))


class PCB(Method[PCBConfig]):
    """PCB-Merging with the balances of a plan."""

    def __init__(self, config: PCBConfig, trimmings: list[Trimming], balances: list[Balance]):
        super().__init__(config, trimmings)
        self.balances = balances

    @classmethod
    def fit(
        cls, config: PCBConfig, plan: MergePlan, device: torch.device, threads: int, advance: Callable[[int], object]
    ) -> "PCB":
        entries = count_entries(plan)
        # The authors count from 0: sorted[int(n * EXTREME)] and sorted[int(n * (1 - EXTREME) - 1)].
        lowest = [Rank(t, min(int(n * EXTREME) + 1, n)) for t, n in enumerate(entries)]
        highest = [Rank(t, min(int(n * (1 - EXTREME) - 1) + 1, n)) for t, n in enumerate(entries)]
        found = find_ranked(plan, lowest + highest, device, threads, advance)
        limits = zip(found[: len(entries)], found[len(entries) :], strict=True)
        extremes = [Balance(low.threshold, high.threshold) for low, high in limits]

        scores = _Scores(extremes)
        ranks = [Rank(t, min(trim_rank(n, config.density) + 1, n)) for t, n in enumerate(entries)]
        trimmings = find_ranked(plan, ranks, device, threads, advance, scores)
        balances = [
            Balance(extreme.low, extreme.high, trimming.threshold, highest)
            for extreme, trimming, highest in zip(extremes, trimmings, scores.highest, strict=True)
        ]
        return cls(config, trimmings, balances)

    def merge_block(self, x: Tensor, unit: Unit, block: Block, record: Recorder) -> Tensor:
        change = balanced_mean(x[1:], [self.balances[expert] for expert in unit.changing], len(self.balances))
        return add_change(x[0], change.mul_(self.config.scale))


class _Scores:
    """Puts the scores in the place of the task vectors (see `trim.Values`), and remembers each expert's highest."""

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
