"""The environment in which tests and campaigns run: a Hub in this process, and a home folder of their own.

huggingface_hub reads its environment once, when it is imported, so `start` comes before that.
"""

import functools
import os
import tempfile

from loopback_hub import LoopbackHub


@functools.cache
def start() -> tuple[LoopbackHub, tempfile.TemporaryDirectory[str]]:
    """Start the Hub, and return it with the home folder. Further calls return the same."""
    hub = LoopbackHub().__enter__()
    home = tempfile.TemporaryDirectory(prefix="neuromerge-tests-")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_MODULES_CACHE", "HF_HUB_OFFLINE"):
        os.environ.pop(name, None)  # these would override the settings below
    os.environ |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": home.name,
        "HF_TOKEN": "hf_loopback",  # never the developer's own token
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DISABLE_SAFETENSORS_CONVERSION": "1",  # else loading a .bin file asks a service on the internet to convert it
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",  # threads slow tiny models down
        "HF_DEACTIVATE_ASYNC_LOAD": "1",  # so do the threads with which transformers reads tensors
    }
    return hub, home
