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
    return led_by_first_process(lambda call: work(), lambda: None)


def led_by_first_process(work: Callable[[Callable[[], None]], T], follow: Callable[[], object]) -> T:
    """Do what `on_first_process` does, but let `work` call for the other processes.

    Args:
        work: a function that gets a function: each call of it makes all other processes call `follow`.
        follow: what the others do then. It must take part in the collective operations of what the first does next.
    """
    if not is_distributed():
        return work(lambda: None)
    group = dist.new_group(backend="gloo", timeout=NO_TIMEOUT)

    def broadcast(message: list[Any]) -> list[Any]:
        dist.broadcast_object_list(message, src=0, group=group)
        return message

    def call() -> None:
        broadcast([True, None, None])

    result: list[T | None] = [None]
    failure: Exception | None = None
    if is_first_process():
        try:
            result = [work(call)]
        except Exception as error:
            failure = error
        outcome = broadcast([False, result[0], str(failure) if failure else None])
    else:
        while (outcome := broadcast([None, None, None]))[0]:
            follow()
    dist.destroy_process_group(group)
    if failure:
        raise failure
    if outcome[2] is not None:
        raise MergeError(f"The first process failed: {outcome[2]}")
    received: T = outcome[1]
    return received


def on_every_process(work: Callable[[], T]) -> T:
    """Run `work` on every process, and return its result on this one. Every process must call this.

    Raises:
        MergeError: on every process, if `work` raises anything on one of them. That one raises what `work` did.
    """
    if not is_distributed():
        return work()
    group = dist.new_group(backend="gloo", timeout=NO_TIMEOUT)
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, str(failure) if failure else None, group=group)
    dist.destroy_process_group(group)
    if failure:
        raise failure
    for rank, theirs in enumerate(failures):
        if theirs is not None:
            raise MergeError(f"Process {rank} failed: {theirs}")
    return result


def is_distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first_process() -> bool:
    """Whether this is the process that writes files."""
    return not is_distributed() or dist.get_rank() == 0
