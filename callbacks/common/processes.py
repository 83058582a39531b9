"""Work that one process of several does, while the others wait for it however long it takes."""

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from neuromerge_hf.errors import MergeError

T = TypeVar("T")

AS_LONG_AS_IT_TAKES = timedelta(days=365)


def on_first_process(work: Callable[[], T]) -> T:
    """What `work` returns on the first process; to be called on all of them, and run on that one alone.

    The others wait in a group of their own: the training's group gives up when its time-out has passed
    (``ddp_timeout``, half an hour by default), and a merge of large models may take longer.

    Args:
        work: returns something small that can be pickled.

    Raises:
        MergeError: on the other processes, if `work` raises anything on the first.
    """
    if not is_distributed():
        return work()
    group = dist.new_group(backend="gloo", timeout=AS_LONG_AS_IT_TAKES)
    result: list[T | None] = [None]
    failure: Exception | None = None
    if is_first_process():
        try:
            result = [work()]
        except Exception as error:
            failure = error
    outcome = [result[0], str(failure) if failure else None]
    dist.broadcast_object_list(outcome, src=0, group=group)
    dist.destroy_process_group(group)
    if failure:
        raise failure
    if outcome[1] is not None:
        raise MergeError(f"The first process failed: {outcome[1]}")
    return outcome[0]  # type: ignore[return-value]


def is_distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first_process() -> bool:
    """Whether this is the process that writes."""
    return not is_distributed() or dist.get_rank() == 0
