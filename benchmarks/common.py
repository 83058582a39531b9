"""Shared code of the benchmarks: measures commands on warm inputs, and writes tables, pictures and results."""

import io
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
from typing import TYPE_CHECKING, Any

import torch
from measure import Measurement, measure

if TYPE_CHECKING:  # matplotlib is loaded only where something is drawn
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
SLOW = 1e9
"""Inputs that are in the page cache are read faster than this, in bytes per second."""


@dataclass(frozen=True)
class Case:
    """A command to measure.

    Attributes:
        name: its name in tables.
        command: the program and its arguments.
        inputs: the weight files that it reads.
        output: the file or folder that it writes; it is removed before and after each run.
        written: how many bytes of weights it writes.
        prepare: a command that brings the program's own files into the page cache. It is not timed.
        runs: the measurements so far.
    """

    name: str
    command: Sequence[str]
    inputs: Sequence[Path]
    output: Path
    written: int
    prepare: Sequence[str] = ()
    runs: list[Measurement] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """The bytes of the inputs and the output, each counted once, however often it is read."""
        return sum(path.stat().st_size for path in self.inputs) + self.written

    @property
    def wall(self) -> float:
        """The median wall time, in seconds."""
        return median(run.wall for run in self.runs)

    @property
    def cpu(self) -> float:
        """The median CPU time, in seconds."""
        return median(run.cpu for run in self.runs)

    @property
    def private_memory(self) -> float:
        """The largest peak of all runs, in bytes."""
        return max(run.private_memory for run in self.runs)

    def run(self) -> None:
        """Run the command once on warm inputs, and record the measurement."""
        if self.prepare:
            subprocess.run(self.prepare, check=True, stdout=subprocess.DEVNULL)
        remove(self.output)
        os.sync()
        warm(self.inputs)
        self.runs.append(measure(self.command))
        remove(self.output)

    def row(self) -> list[str]:
        """Return the cells of a table with the header `COLUMNS`."""
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
"""The header of a table of `Case.row`."""

LOADING = [sys.executable, "-c", "from neuromerge_hf import merge"]
"""A command that loads Python, torch and transformers, as every merge does first."""


def ours(
    name: str, models: Sequence[Path], base: Path, output: Path, *options: object, environment: Sequence[str] = ()
) -> Case:
    """Return a merge with neuromerge's command on the CPU, as a user runs it.

    Args:
        options: further options, such as ``"--density", 1``.
        environment: settings of environment variables, ``NAME=value``.
    """
    program = Path(sys.executable).with_name("neuromerge")
    command = ["env", *environment, program, "merge", *models, "--device", "cpu", "--base-model", base]
    return Case(
        name,
        [str(part) for part in (*command, "--output", output, *options)],
        [weights(model) for model in (base, *models)],
        output,
        weights(base).stat().st_size,
        prepare=LOADING,
    )


def start(output: Path) -> Case:
    """Return the part of a merge that loads Python, torch and transformers."""
    return Case("loading Python, torch and transformers only", LOADING, [], output, 0, prepare=LOADING)


def weights(model: Path) -> Path:
    """Return the weight file of a model or an adapter of `families.py`."""
    full = model / "model.safetensors"
    return full if full.exists() else model / "adapter_model.safetensors"


def warm(files: Iterable[Path]) -> None:
    """Read files twice to bring them into the page cache, and print a note if reading is still slow."""
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
    """Return the number of cores and the memory in GiB."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory / 2**30)}


def software() -> dict[str, str]:
    """Return the versions of Python and torch."""
    return {"python": platform.python_version(), "torch": torch.__version__}


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table. The first column is aligned to the left, the others to the right."""
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
    """Write results to a JSON file, with the machine and the software."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "software": software(), **content}, indent=2) + "\n")


def save_png(figure: "Figure", path: Path, transparent: bool = False) -> None:
    """Write a figure as a PNG with a palette, which makes the file a quarter of the size."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", transparent=transparent)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(drawn).convert("RGBA").quantize(64, Image.Quantize.FASTOCTREE).save(path, format="png", optimize=True)
