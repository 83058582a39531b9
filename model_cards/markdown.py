"""Escaping untrusted text (names of models, tokens, tasks), so that it cannot break the Markdown of a card."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

from neuromerge_hf.errors import INVISIBLE

SPECIAL = re.compile(r"(^[-+#=]|[\\`*_\[\]|~$:@])")
"""Characters that have a meaning in Markdown, in its tables, or in the Hub's mentions and formulas."""

FENCE = "```"

NUMBER = re.compile(r"\**-?\d[\d,.]*%?\**( \(|$)")
"""A cell with a number, which may be bold and have a remark behind it."""


def plain(text: object) -> str:
    """The text on one line, with single spaces and without invisible characters."""
    letters = (" " if letter.isspace() else letter for letter in str(text))
    return " ".join("".join(letter for letter in letters if unicodedata.category(letter) not in INVISIBLE).split())


def escaped(text: object) -> str:
    """The text escaped, for a sentence or a table's cell."""
    entities = plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return SPECIAL.sub(r"\\\1", entities).replace("http\\:", "http&#58;").replace("https\\:", "https&#58;")


def code(text: object) -> str:
    """The text as code, for a sentence or a table's cell. Pipes are escaped, because they end a cell even in code."""
    inner = plain(text)
    ticks = "`" * (max((len(run) for run in re.findall("`+", inner)), default=0) + 1)
    space = " " if inner.startswith("`") or inner.endswith("`") else ""
    return f"{ticks}{space}{inner}{space}{ticks}".replace("|", "\\|")


def block(text: str, language: str = "") -> str:
    """A block of code. Its fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(len(FENCE), longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are already Markdown.

    Columns that are empty in all rows are left out, and columns of numbers are aligned to the right.
    """
    rows = list(rows)
    kept = [column for column in range(len(header)) if any(row[column] for row in rows)]
    numeric = [all(NUMBER.match(row[column]) for row in rows if row[column]) for column in kept]
    lines = [[header[column] for column in kept], ["---:" if is_number else "---" for is_number in numeric]]
    lines += [[row[column] for column in kept] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def folded(summary: str, content: str) -> str:
    """Content that a reader unfolds by a click on its summary. Both are Markdown; GitHub and the Hub show it so."""
    return f"<details>\n<summary>{summary}</summary>\n\n{content}\n\n</details>"


def sentence_list(parts: Sequence[str]) -> str:
    """The parts as a list in a sentence: "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]])) if parts else ""
