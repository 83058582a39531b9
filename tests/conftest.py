"""Every test talks to a Hub in this process and never to the network.

huggingface_hub reads its environment once, when it is imported, so the Hub starts here, before test modules load.
"""

import gc

import pytest

import loopback_environment
from loopback_hub import LoopbackHub

_hub, _home = loopback_environment.start()


def pytest_collection_finish() -> None:
    """Exempt imported objects from garbage collection, which trainers run each time they start."""
    gc.freeze()


def pytest_unconfigure() -> None:
    _hub.__exit__()
    _home.cleanup()


@pytest.fixture
def hub() -> LoopbackHub:
    """The session's Hub, with its counters at zero. Repositories persist, so each test uses names of its own."""
    _hub.forget_traffic()
    return _hub
