"""Separate processes, for tests that interrupt one, let two race, or check the effects of an import.

A server imports torch, transformers and PEFT once and forks itself for each process, as these imports take seconds.
"""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

context: ForkServerContext = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch", "transformers", "transformers.modeling_utils", "accelerate", "peft"])


def start(work: Callable[..., object], *arguments: Any, output: Path) -> ForkServerProcess:
    """Start a process that calls a function.

    Args:
        work: A function of a module in tests/support.
        *arguments: The arguments of the function. They are pickled.
        output: The file for everything that the process prints.
    """
    process = context.Process(target=_run, args=(work, arguments, output), daemon=True)
    process.start()
    return process


def finish(process: ForkServerProcess, seconds: float = 120) -> int | None:
    """Wait for the end of a process and return its exit code. A process that takes longer than `seconds` is killed."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def _run(work: Callable[..., object], arguments: tuple[Any, ...], output: Path) -> None:
    with output.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    try:
        work(*arguments)
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
