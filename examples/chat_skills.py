"""Three skills that a language model can learn within minutes, and whose answers are right or wrong.

Each is an endless stream of prompts with their answers, which a seed determines. The first are held out, and the
experts in `chat_experts/` never saw them.
"""

import json
import random
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from itertools import islice

Example = tuple[str, str]
"""A prompt and its answer."""

HELD_OUT, VALIDATION, TRAINING = 150, 80, 1500
"""How many examples of a skill come first, next and last: for the score, for choices, and for training."""

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


def numbers(order: random.Random) -> Iterator[Example]:
    while True:
        number = int(10 ** order.uniform(2, 7))
        yield f"Write in digits: {in_words(number)}", str(number)


def dates(order: random.Random) -> Iterator[Example]:
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


def records(order: random.Random) -> Iterator[Example]:
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


SKILLS: dict[str, Callable[[random.Random], Iterator[Example]]] = {
    "dates": dates,
    "numbers": numbers,
    "records": records,
}


def examples_of(skill: str) -> list[Example]:
    """Return the examples of a skill, in their order; no prompt occurs twice."""
    found: dict[str, str] = {}
    for prompt, answer in SKILLS[skill](random.Random(skill)):
        found.setdefault(prompt, answer)
        if len(found) == HELD_OUT + VALIDATION + TRAINING:
            return list(found.items())
    raise AssertionError("a skill is endless")


def held_out(skill: str, count: int = HELD_OUT) -> list[Example]:
    """Return examples that no expert was trained on."""
    return list(islice(examples_of(skill), count))
