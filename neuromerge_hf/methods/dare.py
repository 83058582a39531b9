"""DARE (Yu et al., "Language Models are Super Mario", ICML 2024, arXiv:2311.03099), followed by TIES-Merging.

DARE drops entries of each task vector at random and rescales the others. TIES then trims, elects and merges, as in the
authors' code. The random numbers come from the counter-based generator Philox, whose stream is the same in all versions
of numpy. Whether an entry is dropped depends on the seed, the expert's number, the parameter's name and the entry's
position in it; it does not depend on blocks, threads or the device.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neuromerge_hf.config import WeightedConfig, check_density, check_number, is_number
from neuromerge_hf.engine.method import Method, Recorder, add_change, trim_block, weigh_block
from neuromerge_hf.errors import MergeError
from neuromerge_hf.methods.ties import disjoint_mean, elect_sign
from neuromerge_hf.options import option

if TYPE_CHECKING:
    from torch import Tensor

    from neuromerge_hf.engine.passes import Passes
    from neuromerge_hf.sources.unit import Unit
    from neuromerge_hf.storage.layout import Block

NUMBERS_PER_COUNT = 4
"""How many random numbers Philox generates for each value of its counter."""


@dataclass(frozen=True)
class DARETIESConfig(WeightedConfig):
    """The hyper-parameters of DARE (Yu et al., arXiv:2311.03099), followed by TIES-Merging.

    Args:
        drop_rate: the probability that an entry of a task vector is dropped, 0 <= drop_rate < 1. The other entries are
            divided by 1 - drop_rate. The default is from an example of the authors; the paper advises no value.
        density: the fraction of each task vector's entries that TIES keeps after dropping, as in the authors' code. 1
            trims nothing: ``drop_rate=1 - d, density=1`` is what PEFT calls "dare_ties" with the density d.
        scale: the weight of the merged task vector.
        seed: the seed of the random numbers. They also depend on the expert, the parameter and the position.
        exclude: names of parameters to copy from the base, as shell patterns.

    Examples:
        >>> merge(["math"], "merged", base_model="base", config=DARETIESConfig(drop_rate=0.5, seed=1)).method
        'dare_ties'
    """

    method = "dare_ties"
    title = "DARE and TIES-Merging"
    paper = "https://arxiv.org/abs/2311.03099"
    summary = """\
DARE (Yu et al., ICML 2024) drops entries at random of what each fine-tune changed in the base, its task vector, and
rescales the others. TIES-Merging (Yadav et al., NeurIPS 2023) then keeps the largest, elects a sign for each entry, and
takes the mean over the fine-tunes that have it."""

    drop_rate: float = option(0.2, "the share of entries dropped at random")
    density: float = option(0.2, "the fraction of each task vector that is kept")
    scale: float = option(1.0, "the weight of the merged task vector")
    seed: int = option(0, "the random seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.drop_rate) or not 0 <= self.drop_rate < 1:
            raise MergeError(f"drop_rate must be a number with 0 <= drop_rate < 1, not {self.drop_rate!r}.")
        check_density(self.density)
        check_number("scale", self.scale)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 1 << 64:
            raise MergeError(f"seed must be an integer with 0 <= seed < 2**64, not {self.seed!r}.")

    @property
    def passes(self) -> int:
        return 1 if self.density == 1 else 2


def dropped(seed: int, expert: int, parameter: str, first: int, count: int, drop_rate: float) -> Tensor:
    """Return which of the entries [first, first + count) of a task vector are dropped: (count,) bool on the CPU.

    Args:
        seed: the seed of the random numbers.
        expert: the number of the expert in the user's order.
        parameter: the parameter's name in the model.
        first: the position of the first entry in the parameter.
        count: the number of entries.
        drop_rate: the probability that an entry is dropped, below 1.
    """
    import numpy as np
    import torch

    digest = hashlib.sha256(f"{seed} {expert} {parameter}".encode()).digest()
    counter, skipped = divmod(first, NUMBERS_PER_COUNT)
    stream = np.random.Philox(key=np.frombuffer(digest[:16], "<u8"), counter=counter)
    numbers = stream.random_raw(skipped + count)[skipped:]
    return torch.from_numpy(numbers < np.uint64(int(drop_rate * 2**64)))


def drop_and_rescale(task_vector: Tensor, dropped: Tensor, drop_rate: float) -> None:
    """Set the dropped entries to 0 and divide the others by 1 - drop_rate, in place (section 3.2 of the paper)."""
    task_vector.mul_(1 / (1 - drop_rate))
    task_vector.masked_fill_(dropped, 0.0)


class DARETIES(Method[DARETIESConfig], config=DARETIESConfig):
    """DARE and TIES-Merging with the thresholds of the experts."""

    @classmethod
    def fit(cls, config: DARETIESConfig, passes: Passes) -> DARETIES:
        from neuromerge_hf.engine.thresholds import find_trimmings

        def magnitudes(x: Tensor, unit: Unit, block: Block) -> None:
            _drop(x, unit, block, config)
            x[1:].abs_()

        return cls(config, find_trimmings(passes, config.density, magnitudes))

    def merge_block(self, x: Tensor, unit: Unit, block: Block, record: Recorder) -> Tensor:
        if not x[1:].isfinite().all():  # checked first, because dropping would hide it
            raise FloatingPointError("a weight is NaN or infinite")
        _drop(x, unit, block, self.config)
        trim_block(x, unit, [trimming.threshold for trimming in self.trimmings])
        weights = weigh_block(x, unit, self.config)
        change = disjoint_mean(x[1:], elect_sign(x[1:]), weights)
        return add_change(x[0], change.mul_(self.config.scale))


def _drop(x: Tensor, unit: Unit, block: Block, config: DARETIESConfig) -> None:
    first = (block.batch * unit.layout.neurons + block.start) * unit.layout.width
    for task_vector, expert in zip(x[1:], unit.changing, strict=True):
        drop = dropped(config.seed, expert, unit.parameter, first, task_vector.numel(), config.drop_rate)
        drop_and_rescale(task_vector, drop.view(task_vector.shape).to(x.device), config.drop_rate)
