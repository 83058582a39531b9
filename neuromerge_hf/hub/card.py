"""Reading, continuing and validating the model card of a repository on the Hub."""

import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import yaml
from huggingface_hub import HfApi, ModelCard, ModelInfo, hf_hub_download

from neuromerge_hf.errors import MergeError
from neuromerge_hf.model_cards import hand_written
from neuromerge_hf.storage.documents import read_text
from neuromerge_hf.storage.files import CARD
from neuromerge_hf.storage.writing import write_file

KEPT_CARD = "README.before-push.md"


def read_card(api: HfApi, found: ModelInfo) -> str | None:
    """Download the card of a repository; None if it has none."""
    if CARD not in paths_in(found):
        return None
    return read_text(Path(hf_hub_download(found.id, CARD, revision=found.sha, token=api.token)))


def paths_in(found: ModelInfo) -> list[str]:
    """The paths of the files in a repository."""
    return [sibling.rfilename for sibling in found.siblings or []]


def card_to_continue(path: Path, theirs: str | None) -> str | None:
    """The repository's card, with the hand-written text of the folder's card if the repository's card has none.

    If both cards have hand-written text, the folder's card is copied to `KEPT_CARD`.

    Args:
        path: the folder's card.
        theirs: the repository's card, if it has one.

    Returns:
        The text of the card; None if the repository has none.
    """
    if theirs is None or not path.is_file():
        return theirs
    card = read_text(path, encoding="utf-8-sig")
    ours = hand_written(card)
    if ours in hand_written(theirs):
        return theirs
    if not hand_written(theirs):
        return f"{theirs.rstrip()}\n\n{ours}\n"
    write_file(_unused_kept_card(path, card), card)
    return theirs


def _unused_kept_card(path: Path, card: str) -> Path:
    """The path for a copy of a card, which is not that of an earlier copy of another card."""
    kept = path.with_name(KEPT_CARD)
    for number in count(2):
        if not kept.exists() or kept.read_bytes() == card.encode():
            break
        kept = path.with_name(f"README.before-push-{number}.md")
    return kept


def add_tags(path: Path, tags: Sequence[str]) -> None:
    """Add tags to the metadata of a card."""
    card = ModelCard.load(path)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
    write_file(path, str(card))


def validate_card(path: Path) -> None:
    """Let the Hub check the metadata of a card.

    Raises:
        MergeError: if the Hub rejects the metadata.
    """
    try:
        ModelCard.load(path).validate()
    except (ValueError, yaml.YAMLError) as error:
        raise MergeError(
            f"The metadata at the top of {path} are refused: {_refusals(str(error))}. "
            "Correct them there and push again. Nothing was published."
        ) from error


def _refusals(answer: str) -> str:
    """The problems that the Hub's answer lists."""
    try:
        return "; ".join(error["message"] for error in json.loads(answer)["errors"])
    except (ValueError, LookupError, TypeError):  # the client itself rejected the metadata, with a plain message
        return answer
