"""Running work on one of several processes, while the others wait without a time limit."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from neuromerge_hf.errors import MergeError

T = TypeVar("T")

NO_TIMEOUT = timedelta(days=365)
"""A year, because torch accepts no infinite time-out."""


def on_first_process(work: Callable[[], T]) -> T:
    """Run `work` on the first process only, and return its result on all. Every process must call this.

    The others wait in a separate process group: the training's group has a time-out (``ddp_timeout``, half an hour by
    default), and a merge of large models may take longer.

    Args:
        work: a function whose result is small and can be pickled.

    Raises:
        MergeError: on the other processes, if `work` raises anything on the first.
    """
    if not is_distributed():
        return work()
    group = dist.new_group(backend="gloo", timeout=NO_TIMEOUT)
    result: list[T | None] = [None]
    failure: Exception | None = None
    if is_first_process():
        try:
            result = [work()]
        except Exception as error:
            failure = error
    outcome: list[Any] = [result[0], str(failure) if failure else None]
    dist.broadcast_object_list(outcome, src=0, group=group)
    dist.destroy_process_group(group)
    if failure:
        raise failure
    if outcome[1] is not None:
        raise MergeError(f"The first process failed: {outcome[1]}")
    received: T = outcome[0]
    return received


def is_distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first_process() -> bool:
    """Whether this is the process that writes files."""
    return not is_distributed() or dist.get_rank() == 0
