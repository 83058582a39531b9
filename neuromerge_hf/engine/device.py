"""The device of a merge, and its number of threads."""

import os

import torch
from accelerate import PartialState

from neuromerge_hf.errors import MergeError


def find_device(device: str | int | torch.device | None) -> torch.device:
    """Return the device to compute on. The default is the accelerator that accelerate sees, or else the CPU.

    Raises:
        MergeError: if the device cannot be used.
    """
    if device is None:
        return PartialState().device
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:  # the last one: torch is built without it
        name = device if isinstance(device, int) else repr(str(device))
        raise MergeError(f"device={name} cannot be used here: {str(error).splitlines()[0]}") from error
    if found.type == "meta":
        raise MergeError("device='meta' cannot be used here: nothing is computed on it.")
    return found


def default_threads() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
