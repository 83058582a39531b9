"""A disk that is full, or allows no larger files, at any write: one error, nothing left over, and the old output stays.

Each case lets every write from the n-th step on fail, as on a full or a broken disk, or limits the size of files.
"""

import errno
import os
import resource
import signal
import sys
import threading
from functools import cache
from pathlib import Path
from random import Random

import faults
from campaign import Case, Outcome
from kills import IN_PLACE, REPLACING, half_written, leftovers, named, prepare, undisturbed

CASES = 4
"""How many cases the sample of the test suite has."""

FAILED = 1
"""The exit code of a command that reports an error."""


def try_case(seed: int, folder: Path) -> Case:
    random = Random(seed)
    name = random.choice(list(faults.WORKS))
    replaces = name in IN_PLACE or (name in REPLACING and random.random() < 0.7)
    clean = undisturbed(name, replaces, True)
    work, printed = folder / f"work-{seed}", folder / "printed.txt"
    before = prepare(name, work, replaces)
    if random.random() < 0.8:
        step, number = random.randint(1, clean.steps), random.choice([errno.ENOSPC, errno.EDQUOT, errno.EIO])
        tried = f"{name}{' again' * replaces}, {errno.errorcode[number]} from step {step} of {clean.steps} on"
        process = faults.server().start(fill_at, name, work, step, number, output=printed)
    else:
        largest = random.choice(sizes(name, replaces))
        tried = f"{name}{' again' * replaces}, no file larger than {largest} bytes"
        process = faults.server().start(limit, name, work, largest, output=printed)
    code = faults.server().finish(process)
    text = printed.read_text()
    tried += f", exit {code}"
    if code not in (0, FAILED) or "Traceback" in text:
        return Case(seed, Outcome.TRACEBACK, f"{tried}: {text[-2000:]}")
    if code == FAILED and text.count("Error: ") != 1:
        return Case(seed, Outcome.TRACEBACK, f"{tried}: not one error: {text[-2000:]}")
    if hidden := leftovers(work):
        return Case(seed, Outcome.LEFT_OVER, f"{tried}: {hidden}")
    if code == FAILED and name not in IN_PLACE and outputs_of(name, work) != outputs_in(name, before):
        return Case(seed, Outcome.WRONG, f"{tried}: the old output has changed")
    if wrong := half_written(work, before, clean, may_be_away=False, name=name):
        return Case(seed, Outcome.WRONG, f"{tried}: {wrong}")
    return Case(seed, Outcome.CORRECT if code == 0 else Outcome.REFUSED, f"{tried}: {text[-200:]}")


def outputs_of(name: str, work: Path) -> dict[str, bytes]:
    return outputs_in(name, named(faults.files(work)))


def outputs_in(name: str, files: dict[str, bytes]) -> dict[str, bytes]:
    """Files without those in the cache, where the merge may be complete although the head could not be put on it."""
    return {path: data for path, data in files.items() if name != "load" or not path.startswith("cache/")}


def fill_at(name: str, folder: Path, step: int, number: int) -> None:
    """Do a work whose writes fail from a step on."""
    left = [None] * step

    def count() -> None:
        if left:
            left.pop()
        if not left:
            raise OSError(number, os.strerror(number))

    with faults.errors_reported():
        faults.run(name, folder, True, count, faults.GROWING)


def limit(name: str, folder: Path, largest: int) -> None:
    """Do a work where no file may be larger than a number of bytes, except the file of what is printed."""
    lines, outer = [], os.dup(1)
    out, into = os.pipe()
    for stream in (1, 2):
        os.dup2(into, stream)
    os.close(into)
    reader = threading.Thread(target=lambda: lines.extend(iter(lambda: os.read(out, 1 << 16), b"")))
    reader.start()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    try:
        with faults.errors_reported():
            faults.run(name, folder)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        for stream in (1, 2):
            os.dup2(outer, stream)
        reader.join()
        os.write(outer, b"".join(lines))


@cache
def sizes(name: str, replaces: bool) -> list[int]:
    """Sizes just below those of the files that a work writes."""
    return sorted({max(0, len(data) - 1) for data in undisturbed(name, replaces, True).files.values()})
