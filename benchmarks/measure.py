"""Runs a command and measures its process: wall time, CPU time, and peak private memory.

    python benchmarks/measure.py -- neuromerge merge A B --base-model M --output OUT

Private memory is RssAnon. Mapped files do not count, because the kernel may drop their pages at any time.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.01


@dataclass(frozen=True)
class Measurement:
    """The resources that a command used: wall and CPU time in seconds, and peak private memory in bytes."""

    wall: float
    cpu: float
    private_memory: int


def measure(command: Sequence[str], **options: object) -> Measurement:
    """Run a command to its end and measure it.

    Raises:
        RuntimeError: with the command's output, if it fails.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    peak = 0
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_SECONDS):
            peak = max(peak, _private_memory(process.pid))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    done.set()
    sampler.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{output}")
    return Measurement(wall, usage.ru_utime + usage.ru_stime, peak)


def _private_memory(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return 1024 * int(line.split()[1])
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


if __name__ == "__main__":
    print(asdict(measure(sys.argv[sys.argv.index("--") + 1 :])))
