"""Metadata of a merge's parents from the Hub and from their cards: licence, access, languages, data sets."""

import logging
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub import HfApi, constants

from neuromerge_hf.errors import INVISIBLE, printable
from neuromerge_hf.storage.files import CARD
from neuromerge_hf.storage.location import Location
from neuromerge_hf.storage.small_files import LARGEST_CARD, leads_out
from neuromerge_hf.text import readable_size

logger = logging.getLogger(__name__)

LANGUAGES = ("", "bibtex", "bib", "latex")
"""The languages of code blocks on cards that may hold a BibTeX entry."""

BIBTEX = re.compile(r"@\w+\s*\{")
"""The beginning of a BibTeX entry."""

IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.-]*")
"""The form of a licence identifier on the Hub. The card of a local model may hold any text instead."""

LONGEST_TEXT = 500
"""The length in characters up to which a licence's name, a language or the like is copied from a parent's card."""

LONGEST_CITATION = 3000
"""The length in characters up to which a citation is copied into the merged model's card."""


@dataclass(frozen=True)
class Parent:
    """The metadata of a merge's base or expert, as far as its card gives it.

    Attributes:
        license: the identifier of the licence; "other" if the licence has its own name.
        license_name: the licence's own name.
        license_link: the link to the licence's terms.
        gated: whether users must accept the model's terms on the Hub before they can download it.
        task: the Hub's name of the model's task.
        languages: the languages of the model.
        datasets: the data sets that the model was trained on.
        citations: the BibTeX entries.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    gated: bool = False
    task: str | None = None
    languages: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    citations: list[str] = field(default_factory=list)

    @property
    def terms(self) -> str | None:
        """The licence's own name, or else its identifier; None if the card gives neither."""
        return self.license_name or self.license

    @classmethod
    def of(cls, location: Location) -> "Parent":
        """Read the metadata from the Hub and from ``README.md`` in a model's folder, if it exists and can be read."""
        gated = is_gated(location)
        try:
            data, text = _read_card(location)
        except Exception as error:  # the card is not needed, and YAML fails in many ways
            logger.warning(
                "The card of %s is not used: %s. Its licence, languages, data sets and citations are not in the card "
                "of the merge.",
                printable(location),
                printable(error),
            )
            return cls(gated=gated)
        return cls(
            license=", ".join(_texts(data.get("license"))) or None,
            license_name=_text(data.get("license_name")),
            license_link=_text(data.get("license_link")),
            gated=gated,
            task=_text(data.get("pipeline_tag")),
            # YAML reads Norwegian's code, `no` without quotes, as false.
            languages=_texts("no" if data.get("language") is False else data.get("language")),
            datasets=_texts(data.get("datasets")),
            citations=citations(text),
        )


def _read_card(location: Location) -> tuple[dict[str, Any], str]:
    """The metadata and the text of a model's card. Both are empty if it has none."""
    path = location.folder / CARD
    outside = None if location.commit else leads_out(path, location.folder)
    if outside:
        raise ValueError(f"{path} leads out of the model's folder, to {outside}")
    if not path.is_file():
        return {}, ""
    if path.stat().st_size > LARGEST_CARD:
        raise ValueError(f"{path} has more than {readable_size(LARGEST_CARD)}")
    first, *lines = path.read_text(encoding="utf-8-sig").lstrip().split("\n")
    if first.rstrip() != "---" or "---" not in map(str.rstrip, lines):
        return {}, "\n".join([first, *lines])
    end = [*map(str.rstrip, lines)].index("---")
    data = yaml.safe_load("\n".join(lines[:end]))
    return data if isinstance(data, dict) else {}, "\n".join(lines[end + 1 :])


def is_gated(location: Location) -> bool:
    """Whether users must accept a model's terms before a download; false if the Hub cannot be asked."""
    if location.commit is None or location.access.local_files_only:
        return False
    try:
        return bool(
            HfApi(token=location.access.token).model_info(location.repo, timeout=constants.HF_HUB_ETAG_TIMEOUT).gated
        )
    except Exception:  # offline, unreachable or no access: the merge does not depend on it
        return False


def citations(text: str) -> list[str]:
    """The BibTeX blocks on a card, unchanged, without those that are too long or have unbalanced braces."""
    found: list[str] = []
    pieces = iter(re.split(r"^```", text, flags=re.M)[1:-1])  # the insides of code blocks, and what is between them
    for piece in pieces:
        language, _, entry = piece.partition("\n")
        if language.strip().lower() in LANGUAGES and BIBTEX.match(entry.strip()):
            found.append(entry.strip())
            next(pieces, None)
    return [_visible(entry) for entry in found if len(entry) <= LONGEST_CITATION and _is_balanced(entry)]


def common_license(parents: Iterable[Parent]) -> dict[str, str]:
    """The licence's entries for the merged model's card; empty unless all parents give the same licence."""
    terms = {(parent.license, parent.license_name, parent.license_link) for parent in parents}
    license_id, name, link = terms.pop() if len(terms) == 1 else (None, None, None)
    if license_id is None or not IDENTIFIER.fullmatch(license_id) or (license_id == "other" and not (name and link)):
        return {}
    entries = {"license": license_id, "license_name": name, "license_link": link}
    return {key: value for key, value in entries.items() if value}


def union(values: Iterable[Iterable[str]]) -> list[str]:
    """The distinct values, sorted."""
    return sorted({value for several in values for value in several})


def _is_balanced(entry: str) -> bool:
    depth = 0
    for letter in entry:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth < 0:
            return False
    return depth == 0


def _text(value: Any) -> str | None:
    text = " ".join(_visible(value).split()) if isinstance(value, str) else ""
    return text[:LONGEST_TEXT] or None


def _visible(text: str) -> str:
    """A text without invisible characters, except line breaks and tabs."""
    return "".join(each for each in text if each in "\n\t" or unicodedata.category(each) not in INVISIBLE)


def _texts(value: Any) -> list[str]:
    several = value if isinstance(value, list) else [value]
    return [text for each in several if (text := _text(each))]
