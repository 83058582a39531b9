"""Which neurons are measured where measuring all of them would take too long.

Of a large tensor, one of sixteen runs of neurons is measured. The runs are counted from the tensor's first neuron, so
the sums do not depend on blocks or threads.
"""

from collections.abc import Iterator

from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.layout import Block

LARGE = 1 << 20
"""How many entries a tensor has that is not measured whole."""

RUN, PERIOD = 64, 1024
"""Of a large tensor, the first `RUN` neurons of every `PERIOD` are measured."""


def measured_blocks(unit: Unit, block: Block) -> Iterator[Block]:
    """Yield the parts of a block that are measured."""
    if unit.entries < LARGE:
        yield block
        return
    for start in range(block.start // PERIOD * PERIOD, block.stop, PERIOD):
        part = Block(block.batch, max(start, block.start), min(start + RUN, block.stop))
        if part.start < part.stop:
            yield part


def rows_of(part: Block, block: Block) -> slice:
    """Return the rows of a block that hold one of its parts."""
    return slice(part.start - block.start, part.stop - block.start)


def measured_share(unit: Unit) -> float:
    """Return the share of a unit's neurons that is measured."""
    if unit.entries < LARGE:
        return 1.0
    periods, rest = divmod(unit.layout.neurons, PERIOD)
    return (periods * RUN + min(RUN, rest)) / unit.layout.neurons
