"""A process that is killed at any moment leaves the old output or the new one, and the next run removes the rest.

Each case kills a command at its n-th step that changes a file, or after a random time, by SIGKILL, SIGTERM or Ctrl-C.
"""

import json
import os
import re
import shutil
import signal
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import faults
import loopback_environment
from campaign import Case, Outcome
from faults import BY_HAND, WORKS

CASES = 4
"""How many cases the sample of the test suite has."""

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)

CLEANED = (130, 143)
"""The exit codes of a command line that ended itself after a signal."""

REPLACING = ("merge", "tune", "compare")
"""The works that can replace an earlier output."""

IN_PLACE = ("card", "push")
"""The works that write single files into an earlier merge."""

DIFFERS = ("merge_report.json", "README.md", "neuromerge.png")
"""Files that tell the time and the place of a merge."""

END = b"<!-- neuromerge: end mark -->"


@dataclass(frozen=True)
class Clean:
    """What a work does if nothing disturbs it: its number of steps, its seconds, and the files that are there then."""

    steps: int
    seconds: float
    files: dict[str, bytes]


def try_case(seed: int, folder: Path) -> Case:
    random = Random(seed)
    name = random.choice(list(WORKS))
    replaces = name in IN_PLACE or (name in REPLACING and random.random() < 0.7)
    exchange = random.random() < 0.7
    clean = undisturbed(name, replaces, exchange)
    sent = random.choice(SIGNALS)
    work, printed = folder / f"work-{seed}", folder / "printed.txt"
    before = prepare(name, work, replaces)
    if random.random() < 0.6:
        step = random.randint(1, clean.steps)
        moment = f"at step {step} of {clean.steps}"
        code = faults.server().finish(faults.server().start(die_at, name, work, exchange, step, sent, output=printed))
    else:
        seconds = random.uniform(0, 1.1 * clean.seconds)
        moment = f"after {seconds:.2f} s"
        process = faults.server().start(faults.run, name, work, exchange, output=printed)
        time.sleep(seconds)
        os.kill(process, sent)
        code = faults.server().finish(process)
    tried = f"{name}{' again' * replaces}{' by two renames' * (not exchange)}, {sent.name} {moment}, exit {code}"
    if code not in (0, -sent, *CLEANED):
        return Case(seed, Outcome.TRACEBACK, f"{tried}: {printed.read_text()[-2000:]}")
    hidden = leftovers(work)
    if code in CLEANED and hidden:
        return Case(seed, Outcome.LEFT_OVER, f"{tried}: {hidden}")
    wrong = half_written(work, before, clean, may_be_away=not exchange and code == -signal.SIGKILL, name=name)
    if name == "push":
        wrong = wrong or half_published(f"me/{work.name}", clean, finished=False)
    if wrong:
        return Case(seed, Outcome.WRONG, f"{tried}: {wrong}")
    again = faults.server().finish(faults.server().start(faults.run, name, work, output=printed))
    if again:
        return Case(seed, Outcome.WRONG, f"{tried}: a second run ended with {again}: {printed.read_text()[-2000:]}")
    if hidden := leftovers(work):
        return Case(seed, Outcome.LEFT_OVER, f"{tried}: after a second run {hidden}")
    wrong = half_written(work, {}, clean, may_be_away=False, name=name)
    if by_output(named(faults.files(work))).keys() != by_output(clean.files).keys():
        wrong = wrong or f"there are only {sorted(faults.files(work))}"
    if name == "push":
        wrong = wrong or half_published(f"me/{work.name}", clean, finished=True)
    return Case(seed, Outcome.WRONG if wrong else Outcome.CORRECT, f"{tried}, and again: {wrong}" if wrong else tried)


def die_at(name: str, folder: Path, exchange: bool, step: int, sent: signal.Signals) -> None:
    """Do a work, and send this process a signal at a step."""
    left = [None] * step

    def count() -> None:
        if left:
            left.pop()
            if not left:
                os.kill(os.getpid(), sent)

    faults.run(name, folder, exchange, count)


@cache
def undisturbed(name: str, replaces: bool, exchange: bool) -> Clean:
    root = faults.models().parent / "undisturbed" / f"{name}-{replaces}-{exchange}".replace(" ", "-")
    root.mkdir(parents=True, exist_ok=True)
    work, printed = root / "work", root / "printed.txt"
    server = faults.server()
    shutil.rmtree(work, ignore_errors=True)
    prepare(name, work, replaces)
    started = time.monotonic()
    code = server.finish(server.start(faults.count_steps, name, work, exchange, output=printed))
    seconds = time.monotonic() - started
    assert code == 0, printed.read_text()
    assert not leftovers(work)
    return Clean(int(work.with_suffix(".steps").read_text()), seconds, named(faults.files(work)))


def prepare(name: str, work: Path, replaces: bool) -> dict[str, bytes]:
    """Fill the folder in which a work is done, and return its files."""
    work.mkdir()
    if name == "compare" and replaces:
        shutil.copytree(faults.models() / "table", work / "table")
    elif replaces:
        shutil.copytree(faults.models() / "old", work / "merged")
    return named(faults.files(work))


def leftovers(work: Path) -> list[str]:
    """The temporary files and folders in a folder."""
    return sorted(path.relative_to(work).as_posix() for path in work.rglob(".*"))


def named(files: dict[str, bytes]) -> dict[str, bytes]:
    """Files that are not hidden. The folder of a head is named after the path of the cache, and here is not."""
    shown = {name: data for name, data in files.items() if not name.startswith(".") and "/." not in name}
    return {re.sub(r"heads/\w{32}/", "heads/KEY/", name): data for name, data in shown.items()}


def half_written(work: Path, before: dict[str, bytes], clean: Clean, *, may_be_away: bool, name: str) -> str:
    """What is wrong with the files in a folder: each output must be the old one or the new one.

    Args:
        before: the files of the old outputs.
        clean: the files of the new ones.
        may_be_away: whether the process may have been killed between two renames.
    """
    found = by_output(named(faults.files(work)))
    old, new = by_output(before), by_output(clean.files)
    for output in old.keys() | found.keys():
        here, earlier = found.get(output, {}), old.get(output, {})
        if here != earlier and not (may_be_away and not here):
            if output not in new:
                return f"{output} should not be there"
            if problem := not_new(here, earlier if name in IN_PLACE else {}, new[output]):
                return f"{output}: {problem}"
    return ""


def not_new(here: dict[str, bytes], old: dict[str, bytes], new: dict[str, bytes]) -> str:
    """What is wrong with the files of an output, of which each is the new one, or the old one if there is one."""
    if not old.keys() | new.keys() >= here.keys() >= (old.keys() or new.keys()):
        return f"it has {sorted(here)}, but the new one {sorted(new)}"
    for path, data in here.items():
        name = path.rpartition("/")[2]
        if data != old.get(path) and name not in DIFFERS and data != new.get(path):
            return f"{path} is neither old nor new"
        if name == "README.md" and (END not in data or (BY_HAND.encode() in new[path]) != (BY_HAND.encode() in data)):
            return f"{path} is cut off, or what people wrote into it is gone"
        if name == "merge_report.json":
            json.loads(data)
    return ""


def by_output(files: dict[str, bytes]) -> dict[str, dict[str, bytes]]:
    """Files by the folder that is the output: the first one, or one in the cache."""
    outputs: dict[str, dict[str, bytes]] = {}
    for name, data in files.items():
        parts = name.split("/")
        outputs.setdefault("/".join(parts[: 2 if parts[0] == "cache" else 1]), {})[name] = data
    return outputs


def half_published(repo_id: str, clean: Clean, *, finished: bool) -> str:
    """What is wrong with a repository, which must have all files of the merge or none."""
    hub = loopback_environment.start()[0]
    found = hub.files(repo_id) if repo_id in hub.repos else {}
    expected = {name.removeprefix("merged/") for name in clean.files}
    if not found.keys() - {".gitattributes"} and not finished:
        return ""
    if missing := expected - found.keys():
        return f"the repository lacks {sorted(missing)}"
    return "" if BY_HAND.encode() in found["README.md"] else "what people wrote into the card was not published"
