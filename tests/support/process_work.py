"""Functions that tests run in processes of their own."""

import logging
import os
import signal
import warnings
from multiprocessing.synchronize import Barrier
from pathlib import Path


def run_command(*arguments: str) -> None:
    """Run the command line so that Ctrl-C interrupts it, even if the tests run in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from neuromerge_hf.cli import app

    app(list(arguments))


def load_merged(everyone: Barrier, base: Path, expert: Path, cache: Path) -> None:
    """Merge an expert into a cache and load it with its head, at the same time as other processes do."""
    from neuromerge_hf import AutoMergedModel

    everyone.wait()
    model = AutoMergedModel.from_pretrained([expert], base_model=base, head=expert.name, merge_cache_dir=cache)
    print(type(model).__name__)


def import_and_merge(adapter: Path, output: Path) -> None:
    """Print which global settings change when every public name is imported and when a merge is made."""
    import torch

    torch.set_num_threads(2)
    before = _global_settings()
    import neuromerge_hf
    import neuromerge_hf.api  # the module must not hide a function
    from neuromerge_hf import merge

    for name in neuromerge_hf.__all__:
        assert callable(getattr(neuromerge_hf, name)), name
    imported = _global_settings()
    merge([adapter], output, threads=2)
    merged = _global_settings()
    print("changed by importing:", [name for name in before if imported[name] != before[name]])
    print("changed by merging:", [name for name in before if merged[name] != imported[name]])


def _global_settings() -> dict[str, object]:
    import torch
    import transformers

    return {
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "seed": torch.random.initial_seed(),
        "random state": torch.random.get_rng_state().sum().item(),
        "verbosity of transformers": transformers.utils.logging.get_verbosity(),
        "log level": logging.getLogger().level,
        "log handlers": list(logging.getLogger().handlers),
        "warning filters": list(warnings.filters),
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
        "umask": os.umask(os.umask(0)),
    }
