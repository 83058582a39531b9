"""What the benchmarks share: warm inputs, commands measured several times, tables, and what the machine is."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import Measurement, measure

RESULTS = Path(__file__).parent / "results"
SLOW = 1e9
"""In bytes per second: inputs that are in the page cache are read faster than this."""


@dataclass(frozen=True)
class Case:
    """A command to measure."""

    name: str
    command: Sequence[str]
    inputs: Sequence[Path]
    """The weight files it reads."""
    output: Path
    """The file or folder it writes; removed before and after each run."""
    written: int
    """How many bytes of weights it writes."""
    prepare: Sequence[str] = ()
    """A command that loads the program's own files from the disk, which is not to be timed."""
    runs: list[Measurement] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Of the inputs and the output, each counted once, however often it is read."""
        return sum(path.stat().st_size for path in self.inputs) + self.written

    @property
    def wall(self) -> float:
        return median(run.wall for run in self.runs)

    @property
    def cpu(self) -> float:
        return median(run.cpu for run in self.runs)

    @property
    def private_memory(self) -> float:
        """The largest, because it is a peak."""
        return max(run.private_memory for run in self.runs)

    def run(self) -> None:
        if self.prepare:
            subprocess.run(self.prepare, check=True, stdout=subprocess.DEVNULL)
        remove(self.output)
        os.sync()
        warm(self.inputs)
        self.runs.append(measure(self.command))
        remove(self.output)

    def row(self) -> list[str]:
        walls = [run.wall for run in self.runs]
        spread = f" ({min(walls):.1f} to {max(walls):.1f})" if len(walls) > 1 else ""
        return [
            self.name,
            f"{self.wall:.1f}{spread}",
            f"{self.cpu:.1f}",
            f"{self.private_memory / 1e6:.0f}",
            f"{self.bytes / self.wall / 1e9:.2f}" if self.bytes else "",
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "wall_seconds": [run.wall for run in self.runs],
            "cpu_seconds": [run.cpu for run in self.runs],
            "private_memory_bytes": [run.private_memory for run in self.runs],
            "bytes": self.bytes,
            "bytes_per_second": self.bytes / self.wall,
        }


COLUMNS = ["", "wall, s", "CPU, s", "private memory, MB", "GB/s"]
"""Of `Case.row`."""


def ours(name: str, models: Sequence[Path], base: Path, output: Path, density: float) -> Case:
    """Our command line as a user of this Python calls it, on the CPU."""
    command = [str(Path(sys.executable).with_name("neuromerge")), "merge", *map(str, models), "--device", "cpu"]
    command += ["--base-model", str(base), "--output", str(output), "--density", str(density)]
    return Case(
        name,
        command,
        [weights(model) for model in (base, *models)],
        output,
        weights(base).stat().st_size,
        prepare=[sys.executable, "-c", "import neuromerge_hf.planning.planner"],
    )


def start(output: Path) -> Case:
    """What every merge begins with: Python, torch and transformers are loaded."""
    command = [sys.executable, "-c", "import neuromerge_hf.planning.planner"]
    return Case("neuromerge, loading Python and torch only", command, [], output, 0, prepare=command)


def weights(model: Path) -> Path:
    """The weight file of a model or an adapter of `families.py`."""
    full = model / "model.safetensors"
    return full if full.exists() else model / "adapter_model.safetensors"


def warm(files: Iterable[Path]) -> None:
    """Read the files twice, so that the page cache holds them, and say so where it still does not."""
    buffer = memoryview(bytearray(1 << 22))
    for _ in range(2):
        started, total = time.perf_counter(), 0
        for path in files:
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    total += count
        speed = total / (time.perf_counter() - started)
    if total and speed < SLOW:
        print(f"Note: warmed inputs were read at {speed / 1e9:.2f} GB/s only; are they in the page cache?", flush=True)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def machine() -> dict[str, int]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory / 2**30)}


def software() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__}


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A Markdown table: the first column to the left, numbers to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "software": software(), **content}, indent=2) + "\n")
