"""Whether the parameters of a model are still what they were, without keeping a copy."""

from typing import Any

import torch
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""An integer dtype for each size of an entry in bytes."""


def parameter_sums(model: torch.nn.Module) -> dict[str, Any]:
    """The shape, the dtype and the sum of the bits of each parameter and buffer that is saved.

    The sums are of integers that wrap around at 64 bits, taken on the tensor's own device: one pass over the memory.
    Of tensors that accelerate keeps on the disk, which cannot be trained, and of quantized ones there is no sum; of
    sharded ones it is that of this process's part.
    """
    sums = {}
    for name, tensor in model.state_dict().items():
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        is_plain = type(local) in (Tensor, torch.nn.Parameter) and not local.is_meta
        total = _as_integers(local.detach()).sum(dtype=torch.int64) if is_plain else 0
        sums[name] = (tuple(tensor.shape), tensor.dtype, total)
    # Only now wait for the devices.
    return {name: (shape, dtype, int(total)) for name, (shape, dtype, total) in sums.items()}


def _as_integers(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers; as fewer wide ones where possible, which are summed several times faster."""
    flat = tensor.contiguous().view(-1)
    starts_at = flat.storage_offset() * flat.itemsize
    wide = flat.nbytes % 8 == 0 and starts_at % 8 == 0
    return flat.view(torch.int64 if wide else INTEGERS[flat.itemsize])
