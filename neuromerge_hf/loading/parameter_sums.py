"""Whether the parameters of a model are still what they were, without keeping a copy."""

import hashlib
from typing import Any

import torch
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""An integer dtype for each size of an entry in bytes."""


def parameter_sums(model: torch.nn.Module) -> dict[str, Any]:
    """The shape, the dtype, and a hash of the sums of the bits, of each parameter and buffer that is saved.

    The bits are summed as integers that wrap around at 64 bits, along the first dimension and along the others, so that
    scaled or exchanged rows do not cancel out: two passes over the memory, on the tensor's own device. Tensors that
    accelerate keeps on the disk, which cannot be trained, and quantized ones are not looked at; of sharded ones it
    is this process's part.
    """
    return {
        name: (tuple(tensor.shape), tensor.dtype, _hash_of_sums(tensor)) for name, tensor in model.state_dict().items()
    }


def _hash_of_sums(tensor: Tensor) -> str:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if type(local) not in (Tensor, torch.nn.Parameter) or local.is_meta or local.numel() == 0:
        return ""
    words = _as_integers(local.detach())
    digest = hashlib.sha256()
    if local.dim() < 2:
        digest.update(bytes(words.cpu().numpy()))
    else:
        digest.update(_sum(words, 0))
        digest.update(_sum(words, 1))
    return digest.hexdigest()


def _sum(words: Tensor, axis: int) -> bytes:
    if words.device.type == "cpu":  # where numpy is four times faster
        return bytes(words.numpy().sum(axis, dtype="int64"))
    return bytes(words.sum(axis, dtype=torch.int64).cpu().numpy())


def _as_integers(tensor: Tensor) -> Tensor:
    """The bits of a tensor as a matrix of integers; of fewer wide ones where they fill a row, which are summed faster.

    Returns:
        (first dimension, all others).
    """
    rows = tensor.contiguous().view(tensor.shape[0] if tensor.dim() > 1 else 1, -1)
    wide = rows.shape[1] * rows.itemsize % 8 == 0 and rows.storage_offset() * rows.itemsize % 8 == 0
    return rows.view(torch.int64 if wide else INTEGERS[rows.itemsize])
