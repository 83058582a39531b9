"""Every test talks to a Hub in this process and never to the network.

huggingface_hub reads its environment once, when it is imported, so the hub starts here, before any test module does.
"""

import os
import tempfile

import pytest

from loopback_hub import LoopbackHub

_hub = LoopbackHub().__enter__()
_home = tempfile.TemporaryDirectory(prefix="neuromerge-tests-")

for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_MODULES_CACHE", "HF_HUB_OFFLINE"):
    os.environ.pop(name, None)  # these would win over what follows
os.environ |= {
    "HF_ENDPOINT": _hub.url,
    "HF_HOME": _home.name,
    "HF_TOKEN": "hf_loopback",  # never the developer's own
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # else loading a .bin file asks a service on the internet to convert it
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "2",  # test times do not depend on the machine's number of cores
}


def pytest_unconfigure():
    _hub.__exit__()
    _home.cleanup()


@pytest.fixture
def hub():
    """The session's hub, with its counters at zero. Repositories stay: use a name of your own."""
    _hub.forget_traffic()
    return _hub
