"""Eight processes at once, on one output or one entry of a cache: the result is whole, the others say that they lost.

With ``overwrite`` each may win. Without it, one does, and the others end with one error.
"""

import re
import time
from pathlib import Path
from random import Random

import faults
from campaign import Case, Outcome
from kills import IN_PLACE, half_written, leftovers, prepare, undisturbed

CASES = 1
"""How many cases the sample of the test suite has."""

PROCESSES = 8

LOST = re.compile(r"exists and is not empty|cannot be put in its place|is no earlier merge")


def try_case(seed: int, folder: Path) -> Case:
    random = Random(seed)
    name = random.choice(["merge", "merge", "new merge", "load", "load", "card", "save", "compare"])
    replaces = name in IN_PLACE or (name in ("merge", "compare") and random.random() < 0.7)
    exchange = random.random() < 0.7
    clean = undisturbed("merge" if name == "new merge" else name, replaces, True)
    work, start = folder / f"work-{seed}", folder / "start"
    before = prepare(name, work, replaces)
    printed = [folder / f"printed-{number}.txt" for number in range(PROCESSES)]
    server = faults.server()
    processes = [server.start(run_after, start, name, work, exchange, output=path) for path in printed]
    start.touch()
    codes = [server.finish(process) for process in processes]
    tried = f"{name}{' again' * replaces}{' by two renames' * (not exchange)}, exits {codes}"
    for code, path in zip(codes, printed, strict=True):
        text = path.read_text()
        if code not in (0, 1) or "Traceback" in text:
            return Case(seed, Outcome.TRACEBACK, f"{tried}: {text[-2000:]}")
        if code == 1 and (text.count("Error: ") != 1 or not LOST.search(text)):
            return Case(seed, Outcome.WRONG, f"{tried}: lost for another reason: {text[-2000:]}")
    if 0 not in codes or (codes.count(0) > 1 and name == "new merge") or (1 in codes and name in ("load", "card")):
        return Case(seed, Outcome.WRONG, tried)
    if hidden := leftovers(work):
        return Case(seed, Outcome.LEFT_OVER, f"{tried}: {hidden}")
    wrong = half_written(work, before, clean, may_be_away=False, name=name)
    return Case(seed, Outcome.WRONG if wrong else Outcome.CORRECT, f"{tried}: {wrong}" if wrong else tried)


def run_after(start: Path, name: str, folder: Path, exchange: bool) -> None:
    """Do a work once the file `start` is there."""
    while not start.exists():
        time.sleep(0.001)
    if name == "new merge":
        inputs = (faults.models() / "math", faults.models() / "code", "--base-model", faults.models() / "base")
        faults.command("merge", *inputs, "--output", folder / "merged", "--threads", 1)
    with faults.errors_reported():
        faults.run(name, folder, exchange)
