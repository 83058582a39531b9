"""DARE (Yu et al., "Language Models are Super Mario", ICML 2024, arXiv:2311.03099) before TIES-Merging: drop entries of
each task vector at random and rescale those that stay; then trim, elect and merge as TIES does, like the authors' code.

The random numbers are those of the counter-based generator Philox, whose stream numpy keeps from version to version.
Whether an entry is dropped depends on the seed, the expert's number, the parameter's name and the entry's position in
it, and on neither blocks, threads nor device.
"""

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from neuromerge_hf.config import DARETIESConfig
from neuromerge_hf.engine.method import Method, Recorder, add_change
from neuromerge_hf.engine.thresholds import find_trimmings
from neuromerge_hf.methods.neuromerging import trim_block
from neuromerge_hf.methods.ties import disjoint_mean, elect_sign
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.layout import Block

PER_COUNT = 4
"""How many random numbers Philox makes each time it counts."""


def dropped(seed: int, expert: int, parameter: str, first: int, count: int, drop_rate: float) -> Tensor:
    """Which of the entries [first, first + count) of a parameter's task vector are dropped: (count,) bool, on the CPU.

    Args:
        expert: the number of the expert in the user's order.
        parameter: its name in the model.
        drop_rate: the probability, below 1.
    """
    digest = hashlib.sha256(f"{seed} {expert} {parameter}".encode()).digest()
    counter, skipped = divmod(first, PER_COUNT)
    stream = np.random.Philox(key=np.frombuffer(digest[:16], "<u8"), counter=counter)
    numbers = stream.random_raw(skipped + count)[skipped:]
    return torch.from_numpy(numbers < np.uint64(int(drop_rate * 2**64)))


def drop_and_rescale(task_vector: Tensor, dropped: Tensor, drop_rate: float) -> None:
    """Set the dropped entries to 0 and divide the others by 1 - drop_rate, in place (section 3.2 of the paper)."""
    task_vector.mul_(1 / (1 - drop_rate))
    task_vector.masked_fill_(dropped, 0.0)


class DARETIES(Method[DARETIESConfig]):
    """DARE and TIES-Merging with the thresholds of a plan."""

    @classmethod
    def fit(
        cls,
        config: DARETIESConfig,
        plan: MergePlan,
        device: torch.device,
        threads: int,
        advance: Callable[[int], object],
    ) -> "DARETIES":
        def magnitudes(x: Tensor, unit: Unit, block: Block) -> None:
            _drop(x, unit, block, config)
            x[1:].abs_()

        return cls(config, find_trimmings(plan, config.density, device, threads, advance, magnitudes))

    def merge_block(self, x: Tensor, unit: Unit, block: Block, record: Recorder) -> Tensor:
        if not x[1:].isfinite().all():  # before it is dropped
            raise FloatingPointError("a weight is NaN or infinite")
        _drop(x, unit, block, self.config)
        trim_block(x, unit, [trimming.threshold for trimming in self.trimmings])
        change = disjoint_mean(x[1:], elect_sign(x[1:]))
        return add_change(x[0], change.mul_(self.config.scale))


def _drop(x: Tensor, unit: Unit, block: Block, config: DARETIESConfig) -> None:
    first = (block.batch * unit.layout.neurons + block.start) * unit.layout.width
    for task_vector, expert in zip(x[1:], unit.changing, strict=True):
        drop = dropped(config.seed, expert, unit.parameter, first, task_vector.numel(), config.drop_rate)
        drop_and_rescale(task_vector, drop.view(task_vector.shape).to(x.device), config.drop_rate)
