"""Where a merge computes: the device, and how many threads."""

import os

import torch
from accelerate import PartialState

from neuromerge_hf.errors import MergeError


def find_device(device: str | torch.device | None) -> torch.device:
    """The device to compute on: the accelerator that accelerate sees, or the CPU, if none is given.

    Raises:
        MergeError: if the device is not there.
    """
    if device is None:
        return PartialState().device
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch's own where it is built without this kind of device
        raise MergeError(f"device={str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from error


def default_threads() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
