"""What the engine asks of a method."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from neuromerge_hf.config import MergeConfig
from neuromerge_hf.engine.histogram import Trimming
from neuromerge_hf.engine.low_rank import StackedFactors
from neuromerge_hf.engine.statistics import BlockStatistics
from neuromerge_hf.engine.thresholds import count_entries
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.layout import Block

Config = TypeVar("Config", bound=MergeConfig)

Recorder = Callable[[BlockStatistics], object]


class Method(ABC, Generic[Config]):
    """A method that is ready to merge the blocks of a plan.

    Args:
        trimmings: how each expert's task vector is trimmed, for the report as well.
    """

    def __init__(self, config: Config, trimmings: list[Trimming]):
        self.config = config
        self.trimmings = trimmings

    @classmethod
    def fit(
        cls, config: Config, plan: MergePlan, device: torch.device, threads: int, advance: Callable[[int], object]
    ) -> "Method[Config]":
        """The method with what it needs of the whole model; see `fit_method`. Here: nothing."""
        return cls(config, [Trimming(0.0, 0.0, entries) for entries in count_entries(plan)])

    @abstractmethod
    def merge_block(self, x: Tensor, unit: Unit, block: Block, record: Recorder) -> Tensor:
        """Merge a block of neurons.

        Args:
            x: (1 + T, neurons, width) float32, the base and the task vectors of the experts that change it, which may
                be overwritten.
            unit: what the block is of.
            block: which neurons.
            record: called with what the elections tell of the experts, by methods that hold them neuron by neuron.

        Returns:
            (neurons, width) float32; each entry has the same bits whatever the block.

        Raises:
            FloatingPointError: if an input holds a NaN or an infinity.
        """

    def find_factors(self, unit: Unit, device: torch.device) -> StackedFactors | None:
        """The factors of a unit that can be merged without forming its task vectors."""
        return None

    def merge_factors(self, base: Tensor, left: Tensor, factors: StackedFactors, record: Recorder) -> Tensor:
        """Merge a block from the factors of its task vectors; see `kernel.merge_low_rank`."""
        raise NotImplementedError


def summed(terms: Iterable[Tensor]) -> Tensor:
    """The sum of tensors, in their order. (The last bits of torch's own sums depend on where an entry is in memory.)"""
    iterator = iter(terms)
    total = next(iterator).clone()
    for term in iterator:
        total += term
    return total


def add_change(base: Tensor, change: Tensor) -> Tensor:
    """``base + change``; entries that are not changed are the base's bit for bit. `change` is overwritten.

    Raises:
        FloatingPointError: if the result is not finite.
    """
    unchanged = change == 0
    merged = torch.where(unchanged, base, change.add_(base))
    if not merged.isfinite().all():
        raise FloatingPointError("a weight is NaN or infinite")
    return merged
