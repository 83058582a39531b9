"""What a merge's parents say about themselves on the Hub and on their cards: licence, access, languages, data sets."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard, constants

from neuromerge_hf.storage.location import Location

BIBTEX = re.compile(r"^```\s*(?:bibtex|bib|latex)?[ \t]*\n(\s*@\w+\s*\{.*?)\n```", re.S | re.M | re.I)
"""A block of code on a card that begins with an entry for BibTeX."""

IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.-]*")
"""What the Hub's identifiers of licences look like. Others can stand on the card of a model that is not there."""

LONGEST_CITATION = 3000
"""In characters. What is longer is not copied into another model's card."""


@dataclass(frozen=True)
class Parent:
    """A model that went into a merge, as far as its own card tells.

    Attributes:
        license: the licence's identifier; "other" if it has a name of its own.
        license_name: that name.
        license_link: where its terms are, if the card says so.
        gated: whether its terms have to be accepted on the Hub before it can be downloaded.
        task: the Hub's name of what it does.
        languages: of the texts that it is for.
        datasets: that it was trained on.
        citations: BibTeX entries.
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
        """The licence as people call it; None if the card does not say."""
        return self.license_name or self.license

    @classmethod
    def of(cls, location: Location) -> "Parent":
        """What ``README.md`` in a model's folder says; nothing where there is none, or none that can be read."""
        gated = is_gated(location)
        try:
            card = ModelCard.load(location.folder / "README.md", ignore_metadata_errors=True)
        except (OSError, ValueError, TypeError, yaml.YAMLError):
            return cls(gated=gated)
        data = card.data.to_dict()
        return cls(
            license=", ".join(_texts(data.get("license"))) or None,
            license_name=_text(data.get("license_name")),
            license_link=_text(data.get("license_link")),
            gated=gated,
            task=_text(data.get("pipeline_tag")),
            languages=_texts("no" if data.get("language") is False else data.get("language")),  # unquoted Norwegian
            datasets=_texts(data.get("datasets")),
            citations=citations(card.text),
        )


def is_gated(location: Location) -> bool:
    """Whether the Hub gives a model only to those who accepted its terms; false if it cannot be asked."""
    if location.commit is None:
        return False
    try:
        return bool(HfApi(token=location.token).model_info(location.repo, timeout=constants.HF_HUB_ETAG_TIMEOUT).gated)
    except Exception:  # offline, unreachable, or no access any more: the merge does not depend on it
        return False


def citations(text: str) -> list[str]:
    """The BibTeX entries on a card, each block as it stands there."""
    found = [match.strip() for match in BIBTEX.findall(text)]
    return [entry for entry in found if len(entry) <= LONGEST_CITATION and _is_balanced(entry)]


def common_license(parents: Iterable[Parent]) -> dict[str, str]:
    """The licence's entries of the merged model's metadata; empty if the parents differ, or one does not say."""
    terms = {(parent.license, parent.license_name, parent.license_link) for parent in parents}
    license_id, name, link = terms.pop() if len(terms) == 1 else (None, None, None)
    if license_id is None or not IDENTIFIER.fullmatch(license_id) or (license_id == "other" and not (name and link)):
        return {}
    entries = {"license": license_id, "license_name": name, "license_link": link}
    return {key: value for key, value in entries.items() if value}


def union(values: Iterable[Iterable[str]]) -> list[str]:
    """All values, each once, sorted."""
    return sorted({value for several in values for value in several})


def _is_balanced(entry: str) -> bool:
    depth = 0
    for letter in entry:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth < 0:
            return False
    return depth == 0


def _text(value: Any) -> str | None:
    return value.strip() or None if isinstance(value, str) else None


def _texts(value: Any) -> list[str]:
    several = value if isinstance(value, list) else [value]
    return [text for each in several if (text := _text(each))]
