"""What the licences of a merge's parents mean for the merged model, in plain words."""

import re
from collections.abc import Sequence

from neuromerge_hf.folder.parents import Parent
from neuromerge_hf.model_cards.markdown import escaped, sentence_list

MEANINGS = {
    r"-nc\b": "forbids commercial use",
    r"-nd\b": "forbids sharing what is made from it",
    r"-sa\b|gpl|\bosl|eupl|\bmpl": "asks that what is made from it is shared under the same licence",
    r"llama|gemma|rail|bigscience|\bapple|\bother$": "has conditions of its own",
}
"""The restrictions of some licences, by patterns of the Hub's identifiers. They are no legal advice."""


def remarks(parents: Sequence[tuple[str, Parent]]) -> list[str]:
    """Sentences on licences that differ, are missing, or restrict what may be done with the merged model.

    Args:
        parents: the name in Markdown and the record of each parent.
    """
    found = []
    stated = {parent.terms for _, parent in parents if parent.terms}
    if len(stated) > 1:
        found.append("**The licences differ.** The terms of all of them apply to the merged model at once.")
    for pattern, meaning in MEANINGS.items():
        names = [
            f"{name} ({escaped(parent.terms)})"
            for name, parent in parents
            if re.search(pattern, (parent.license or "").lower())
        ]
        if names:
            found.append(f"The licence of {sentence_list(names)} {meaning}.")
    silent = [name for name, parent in parents if not parent.terms]
    if silent and len(silent) < len(parents):
        found.append(f"No licence is stated by {sentence_list(silent)}: ask the authors before you share this model.")
    gated = [name for name, parent in parents if parent.gated]
    if gated:
        found.append(f"Access to {sentence_list(gated)} is gated: its terms have to be accepted on its page first.")
    return found
