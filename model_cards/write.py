"""Writing a card into a merged model's folder, around the text that people wrote by hand."""

import dataclasses
import logging
import os
import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from neuromerge_hf.errors import printable
from neuromerge_hf.folder.assets import check_own_files
from neuromerge_hf.folder.recipe import Recipe
from neuromerge_hf.model_cards.card import MergeCard
from neuromerge_hf.model_cards.metadata import combined, metadata
from neuromerge_hf.model_cards.picture import NAME as PICTURE
from neuromerge_hf.model_cards.picture import draw
from neuromerge_hf.model_cards.render import render
from neuromerge_hf.storage.documents import read_text
from neuromerge_hf.storage.paths import user_path
from neuromerge_hf.storage.writing import write_file
from neuromerge_hf.typed import check_value

CARD_NAME = "README.md"

logger = logging.getLogger(__name__)

BEGIN = "<!-- neuromerge: written anew each time down to the end mark, with the metadata {keys}. -->"
END = "<!-- neuromerge: end mark -->"
BEGIN_PATTERN = re.compile(re.escape(BEGIN).replace(r"\{keys\}", r"([\w, -]*)"))


def write_card(
    folder: Path,
    repo_id: str | None = None,
    *,
    name: str | None = None,
    template: str | os.PathLike[str] | None = None,
    previous: str | None = None,
    recipe: Recipe | None = None,
) -> Path:
    """Write or update ``README.md`` and its picture, and return the path of ``README.md``.

    Text before and after the marked part of the previous card is kept. So are tags and metadata that were added to it,
    unless the new card sets the same entries.

    Args:
        folder: the folder that a merge wrote.
        repo_id: the repository that the card is for; None for a folder on this machine.
        name: the title; by default the name of the repository or of the folder.
        template: as in `render`.
        previous: the text of the previous card, if it is not the ``README.md`` in the folder.
        recipe: as in `MergeCard.of`.

    Raises:
        MergeError: if the folder was not written by a merge, or the template cannot be used.
    """
    folder = user_path(folder, "folder")
    check_value("repo_id", repo_id, str | None)
    check_own_files(folder)
    path = folder / CARD_NAME
    if previous is None and path.is_file():
        previous = read_text(path, encoding="utf-8-sig")
    card = MergeCard.of(folder, repo_id, name, recipe)
    card = dataclasses.replace(card, has_picture=_draw(card, folder / PICTURE))
    new = metadata(card).to_dict()
    begin = BEGIN.format(keys=", ".join(new))
    before, after = "", ""
    if previous:
        old, text = _parts(previous)
        before, own_keys, after = _by_hand(text)
        new = combined({key: value for key, value in old.items() if key not in own_keys}, new)
    header = yaml.safe_dump(new, sort_keys=False, allow_unicode=True)
    text = f"---\n{header}---\n{before}{begin}\n\n{render(card, template).strip()}\n\n{END}{after}"
    write_file(path, text.rstrip() + "\n")
    return path


def _draw(card: MergeCard, path: Path) -> bool:
    """Draw the picture if there is something to draw, and return whether there is one. The card does without it.

    An earlier picture stays if a new one cannot be drawn: it shows the same merge, perhaps without the latest results.
    """
    if card.report.diagnostics is None:
        return False
    try:
        draw(card.report.diagnostics, card.report.results, path)
    except Exception as error:  # the libraries that draw document no exceptions
        logger.warning("The picture of the card was not drawn: %s", printable(error))
        return path.is_file()
    return True


def hand_written(card: str) -> str:
    """The text that people wrote into a card before and after its marked part."""
    before, _, after = _by_hand(_parts(card)[1])
    return f"{before}{after}".strip()


def _by_hand(text: str) -> tuple[str, list[str], str]:
    """The text before the marked part of a card, the metadata keys of that part, and the text after it."""
    begin = BEGIN_PATTERN.search(text)
    if begin is None or END not in text[begin.end() :]:
        # Directly after the end mark, Markdown would take a heading for a part of the comment.
        return "", [], text and f"\n\n{text.lstrip()}"
    own_keys = [key for key in begin[1].split(", ") if key != "tags"]  # old and new tags are combined
    return text[: begin.start()], own_keys, text.rpartition(END)[2]


def _parts(text: str) -> tuple[dict[str, object], str]:
    """The metadata and the body of a card. The metadata are empty if they cannot be read."""
    try:
        card = ModelCard(text, ignore_metadata_errors=True)
    except Exception:  # YAML fails in many ways
        return {}, text
    return card.data.to_dict(), card.text
