"""Merging the blocks of a plan with a method."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from neuromerge_hf.engine import low_rank
from neuromerge_hf.engine.low_rank import Factors
from neuromerge_hf.engine.method import Method, Recorder
from neuromerge_hf.engine.passes import BLOCK_ENTRIES, Memory, load_base, load_block, non_finite
from neuromerge_hf.planning.plan import MergePlan, Unit
from neuromerge_hf.storage.layout import Block

Item = tuple[Unit, Block, Factors | None]


class BlockMerger:
    """Merges the blocks of a plan's units, on any number of threads."""

    def __init__(self, plan: MergePlan, method: Method[Any], device: torch.device):
        self._names = [expert.name for expert in plan.experts]
        self._method = method
        self._device = device
        self._memory = Memory()

    def items(self, units: Iterable[Unit]) -> Iterator[Item]:
        """The blocks of some units, with the factors of those that are merged from them."""
        for unit in map(Unit.opened, units):
            factors = self._method.find_factors(unit, self._device)
            for block in unit.layout.blocks(low_rank.BLOCK_ENTRIES if factors else BLOCK_ENTRIES):
                yield unit, block, factors

    def merge(self, item: Item, record: Recorder, look: Callable[[Tensor], object] = lambda _: None) -> Tensor:
        """Merge a block that some expert may change.

        Args:
            record: called with what the elections tell.
            look: is shown base and task vectors, (1 + T, neurons, width), untrimmed, where they are formed.

        Raises:
            MergeError: if a weight is NaN or infinite.
        """
        unit, block, factors = item
        try:
            if factors:
                base = load_base(unit, block, self._memory, self._device)
                return self._method.merge_factors(base, factors.rows(unit, block), factors, record)
            x = load_block(unit, block, self._memory, self._device)
            look(x)
            return self._method.merge_block(x, unit, block, record)
        except FloatingPointError:
            raise non_finite(unit, block, self._names, self._device) from None
