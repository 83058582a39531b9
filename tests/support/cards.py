"""Writing cards for tests, and reading their metadata, sections and tables."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from neuromerge_hf.folder.parents import Parent
from neuromerge_hf.folder.report import load_report
from neuromerge_hf.model_cards import write_card

SECTIONS = [
    "Quick start",
    "Evaluation",
    "Merged models",
    "Method",
    "Parameters",
    "What each expert changed",
    "Reproduce",
    "Licences",
    "Limits",
    "Citation",
]


def save_card(folder: Path, **metadata: object) -> None:
    """Write the card of a merge's parent with some metadata."""
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n# A model\n")


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """The metadata and the body of a card."""
    _, header, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(header), body


def parse(body: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(body)


def headings(body: str) -> list[str]:
    tokens = parse(body)
    return [after.content for token, after in itertools.pairwise(tokens) if token.type == "heading_open"]


def code_blocks(body: str, language: str) -> list[str]:
    return [token.content for token in parse(body) if token.type == "fence" and token.info == language]


def table_under(body: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading."""
    rows: list[list[str]] = []
    inside = False
    for token in parse(body.partition(f"## {heading}\n")[2]):
        if token.type == "table_close":
            break
        if token.type == "tr_open":
            rows.append([])
        inside = token.type in ("td_open", "th_open") or (inside and token.type == "inline")
        if token.type == "inline" and inside:
            rows[-1].append(token.content)
    return rows


def add_settings(path: Path, **settings: object) -> None:
    """Change the settings in a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def with_parents(folder: Path, *parents: Parent) -> tuple[dict[str, Any], str]:
    """Replace the parents in a merge's report, write its card again, and return the card."""
    report = load_report(folder)
    dataclasses.replace(report, parents=list(parents)).save(folder)
    write_card(folder)
    return card_of(folder)


def outline(body: str) -> list[str]:
    """The structure of a page without its words: the types of its blocks, table cells, links, images and HTML."""
    found = []
    for token in parse(body):
        if token.type != "inline":
            found.append(token.type)
        found += [child.type for child in token.children or [] if child.type in ("link_open", "image", "html_inline")]
    return found
