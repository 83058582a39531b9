"""What the campaigns against faults and hostile input have in common.

A campaign is a module of tests/fuzz with a docstring and a function ``try_case(seed, folder)``. Everything that a case
does follows from its seed, so a case that fails is repeated by its seed.
"""

import importlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import count
from pathlib import Path
from time import monotonic
from typing import cast

from neuromerge_hf.errors import MergeError


class Outcome(Enum):
    """How a case ended. The last three are defects."""

    CORRECT = "correct"
    REFUSED = "refused rightly"
    WRONG = "wrong"
    TRACEBACK = "traceback"
    LEFT_OVER = "left over"


GOOD = (Outcome.CORRECT, Outcome.REFUSED)


@dataclass(frozen=True)
class Case:
    """A case that was tried.

    Attributes:
        seed: what repeats it.
        outcome: how it ended.
        detail: what was tried, and what is wrong with the end.
    """

    seed: int
    outcome: Outcome
    detail: str = ""


TryCase = Callable[[int, Path], Case]
"""Tries the case of a seed, in an empty folder that is deleted afterwards."""

CAMPAIGNS: dict[str, str] = {
    "hostile": "hostile",
    "headers": "headers",
    "pickles": "pickles",
    "values": "values",
    "configs": "configs",
    "recipes": "recipes",
    "arguments": "arguments",
    "kills": "kills",
    "disks": "disks",
    "races": "races",
    "changes": "changing",
}
"""The module of each campaign, by its name."""


def load_campaign(name: str) -> TryCase:
    """Return the function that tries a case of a campaign."""
    return cast(TryCase, importlib.import_module(CAMPAIGNS[name]).try_case)


def run_cases(try_case: TryCase, seeds: Iterator[int], seconds: float) -> Iterator[Case]:
    """Try cases until the time is over. A `MergeError` is a refusal, any other exception a traceback."""
    end = monotonic() + seconds
    for seed in seeds:
        if monotonic() >= end:
            return
        with tempfile.TemporaryDirectory(prefix="neuromerge-fuzz-") as folder:
            try:
                yield try_case(seed, Path(folder))
            except MergeError as error:
                yield Case(seed, Outcome.REFUSED, str(error))
            except Exception as error:
                yield Case(seed, Outcome.TRACEBACK, f"{type(error).__name__}: {error}")


def run_campaign(name: str, seed: int, seconds: float) -> tuple[Counter[Outcome], list[Case]]:
    """Run a campaign from a seed on, for some seconds. Return how the cases ended, and those that show a defect."""
    outcomes, bad = Counter[Outcome](), []
    for case in run_cases(load_campaign(name), count(seed), seconds):
        outcomes[case.outcome] += 1
        if case.outcome not in GOOD:
            bad.append(case)
    return outcomes, bad
