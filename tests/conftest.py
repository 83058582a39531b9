"""Every test talks to a Hub in this process and never to the network.

huggingface_hub reads its environment once, when it is imported, so the Hub starts here, before test modules load.
"""

import gc
import os
import tempfile

import pytest

from loopback_hub import LoopbackHub

_hub = LoopbackHub().__enter__()
_home = tempfile.TemporaryDirectory(prefix="neuromerge-tests-")

for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_MODULES_CACHE", "HF_HUB_OFFLINE"):
    os.environ.pop(name, None)  # these would override the settings below
os.environ |= {
    "HF_ENDPOINT": _hub.url,
    "HF_HOME": _home.name,
    "HF_TOKEN": "hf_loopback",  # never the developer's own token
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # else loading a .bin file asks a service on the internet to convert it
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # threads slow tiny models down
    "HF_DEACTIVATE_ASYNC_LOAD": "1",  # so do the threads with which transformers reads tensors
}


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
