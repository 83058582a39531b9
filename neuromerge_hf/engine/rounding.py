"""Measures, while the weights are written, what rounding to the dtype of the output leaves of the merged change.

Large tensors are measured in part; see `engine.measured`.
"""

import math

import torch
from torch import Tensor

from neuromerge_hf.engine.blocks import Memory, load_base
from neuromerge_hf.engine.cpu_kernel import Combination
from neuromerge_hf.engine.measured import measured_blocks, rows_of
from neuromerge_hf.folder.rounding import KindRounding, Rounding
from neuromerge_hf.sources.unit import Unit, Work
from neuromerge_hf.storage.finite import name_of
from neuromerge_hf.storage.layout import Block
from neuromerge_hf.text import kind_of

ROUNDED = (torch.float16, torch.bfloat16)
"""The dtypes to which merged weights are rounded. Merges are computed in float32."""

CHUNK = 1 << 16
"""How many entries are converted to float64 at a time."""


def is_rounded(unit: Unit) -> bool:
    """Whether a unit is merged and then rounded."""
    return bool(unit.task_vectors) and unit.dtype in ROUNDED


def measure(unit: Unit, block: Block, merged: Tensor | Combination, written: Tensor, memory: Memory) -> Tensor:
    """Return the inner products of the merged change and the rounding error of a block: (2, 2) float64 on the CPU.

    Args:
        unit: a unit that `is_rounded`.
        block: the neurons of the unit that the rows hold.
        merged: (neurons, width) float32, the merged rows, or how the compiled kernel forms them.
        written: the same rows in the dtype of the output.
        memory: buffers to reuse.
    """
    products = torch.zeros(2, 2, dtype=torch.float64, device=written.device)
    for part in measured_blocks(unit, block):
        rows = rows_of(part, block)
        base = load_base(unit, part, memory, written.device, buffer="measured")
        parts = (values.flatten().split(CHUNK) for values in (base, merged[rows], written[rows]))
        for before, after, rounded in zip(*parts, strict=True):
            change, error = (after - before).double(), (rounded.float() - after).double()
            product = change @ error
            products += torch.stack([change @ change, product, product, error @ error]).view(2, 2)
    return products.cpu()


class RoundingCollector:
    """Collects the products of `measure` by the kinds of the parameters."""

    def __init__(self, work: Work):
        rounded = [unit for unit in work.merged if is_rounded(unit)]
        self._dtypes = sorted({name_of(unit.dtype) for unit in rounded})
        self._products = {kind_of(unit.parameter): torch.zeros(2, 2, dtype=torch.float64) for unit in rounded}

    def add(self, unit: Unit, products: Tensor) -> None:
        """Add the products of a block of a unit."""
        self._products[kind_of(unit.parameter)] += products

    def rounding(self) -> Rounding | None:
        """Return what rounding left of the merged change; None if nothing was rounded or changed."""
        changed = {kind: products for kind, products in self._products.items() if products[0, 0] > 0}
        if not changed:
            return None
        kinds = [_kind(kind, products) for kind, products in changed.items()]
        return Rounding(" and ".join(self._dtypes), _kind("all", sum(changed.values(), torch.zeros(()))), kinds)


def _kind(kind: str, products: Tensor) -> KindRounding:
    change, error, product = products[0, 0].item(), products[1, 1].item(), products[0, 1].item()
    written = max(0.0, change + 2 * product + error)
    is_written = written > 1e-12 * change  # less is rounding errors of the sums
    cosine = min(1.0, (change + product) / math.sqrt(change * written)) if is_written else None
    return KindRounding(
        kind=kind,
        lost=round(error / change, 6),
        cosine=None if cosine is None else round(cosine, 6),
        norm_ratio=round(math.sqrt(written / change), 6) if is_written else 0.0,
    )
