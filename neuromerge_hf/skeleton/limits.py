"""Limits to the models that configurations from anywhere describe, so that none is too large to be made."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from neuromerge_hf.errors import MergeError

SPARE = 20_000, 100
"""The parameters and modules that a model may have beyond its stored tensors, and for each of them.

Models share layers, and store many parameters as one tensor. A model of this many is made in two seconds.
"""


def most_parts(tensors: int) -> int:
    """Return how many parameters and modules the class of a checkpoint may have that stores this many tensors."""
    return SPARE[0] + SPARE[1] * tensors


@contextmanager
def at_most(parts: int) -> Iterator[None]:
    """Stop the block once it has made more parameters and modules than this.

    Raises:
        MergeError: if it has.
    """
    made, thread = 0, get_ident()

    def count(*_: object) -> None:
        nonlocal made
        made += get_ident() == thread
        if made > parts:
            raise MergeError(
                f"more than {parts:,} parameters and modules are too many for its stored tensors. Check the numbers of "
                "layers and experts, such as num_hidden_layers"
            )

    hooks = [register_module_parameter_registration_hook(count), register_module_module_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
