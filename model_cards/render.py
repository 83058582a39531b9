"""Rendering the text of a card from its Jinja template."""

import functools
import os
import re

from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateSyntaxError

from neuromerge_hf.errors import MergeError
from neuromerge_hf.model_cards import markdown, tables
from neuromerge_hf.model_cards.card import MergeCard
from neuromerge_hf.model_cards.limits import limits
from neuromerge_hf.model_cards.picture import NAME as PICTURE
from neuromerge_hf.storage.documents import read_text, reason_of
from neuromerge_hf.storage.paths import user_path
from neuromerge_hf.text import percent, readable_size
from neuromerge_hf.version import __version__

TEMPLATE = "merge.md.jinja"

ACTING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that act on a terminal or turn the direction of text. A report that was edited can hold them anywhere."""


def render(card: MergeCard, template: str | os.PathLike[str] | None = None) -> str:
    """Render the whole card, without its metadata.

    Args:
        card: the content of the card.
        template: the path of the user's own Jinja template. It may extend "merge.md.jinja" and replace its blocks.

    Raises:
        MergeError: if the template cannot be read or rendered.
    """
    environment = _environment()
    try:
        if template is None:
            chosen = environment.get_template(TEMPLATE)
        else:
            chosen = environment.from_string(read_text(user_path(template, "template")))
        text = chosen.render(
            card=card,
            report=card.report,
            recipe=card.recipe,
            limits=limits(card),
            tables=tables,
            picture=PICTURE,
            version=__version__,
        )
        return ACTING.sub("", text)
    except MergeError:
        raise
    except Exception as error:  # a template can call anything that it is given
        if template is None:
            raise
        line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        raise MergeError(f"The template {os.fspath(template)}{line} cannot be used: {reason_of(error)}.") from error


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("neuromerge_hf.model_cards", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the output is Markdown, and the filters escape untrusted text
    )
    environment.filters |= {
        "text": markdown.escaped,
        "code": markdown.code,
        "block": markdown.block,
        "size": readable_size,
        "percent": percent,
        "sentence_list": markdown.sentence_list,
    }
    return environment
