"""Regular expressions in the configurations of adapters: whether each match of a module's name ends soon."""

import re
import warnings
from collections.abc import Iterator
from typing import Any

EXPRESSIONS = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern")
"""Options that are regular expressions if they are a text. The keys of ``*_pattern`` always are."""

LONGEST = 100_000
"""The length in characters up to which an expression is used. One that lists all modules of a model is shorter."""

MOST_REPEATS = 6
"""How many repeats may follow each other. Python tries all ways to share out a name's letters among them."""

TOKEN = re.compile(
    r"""\\.|\[\^?\]?(?:\\.|[^\]\\])*\]            # an escaped letter, a set of letters
    |\(\?(?:[aiLmsux-]+\)|\#[^)]*\)|P=\w+\))      # a flag, a comment, a reference
    |\((?:\?(?:P?<\w+>|<?[=!]|[:>]|[aiLmsux-]+:))?  # the start of a group
    |\)|\||[*+?]|\{\d*,?\d*\}|.""",
    re.S | re.X,
)


def problems_of(settings: dict[str, Any]) -> Iterator[str]:
    """Say what is wrong with each regular expression of an adapter's configuration that must not be matched."""
    for option in (*EXPRESSIONS, "rank_pattern", "alpha_pattern"):
        value = settings.get(option)
        many = option == "layers_pattern" or isinstance(value, dict)
        expressions = [value] if isinstance(value, str) else list(value or ()) if many else []
        for expression in expressions:
            reason = reason_against(expression) if isinstance(expression, str) else None
            if reason:
                yield f"{option} has the regular expression {expression!r:.200}, {reason}."


def reason_against(expression: str) -> str | None:
    """Why a regular expression must not be matched; None if it can be."""
    if len(expression) > LONGEST:
        return f"which is longer than {LONGEST} characters"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        return f"which is not valid ({error})"
    if _may_take_forever(expression):
        return "which could take years to match a name: it repeats what itself varies, or repeats too often"
    return None


def _may_take_forever(expression: str) -> bool:
    """Whether a repeated group holds a repeat or alternatives, or many repeats follow each other."""
    varies, closed, repeats, before = [False], False, 0, ""
    for token in TOKEN.findall(expression):
        if token.startswith("(") and not token.endswith(")"):
            varies.append(False)
        elif token == ")" and len(varies) > 1:
            closed = varies.pop()
            varies[-1] |= closed
        elif token == "|":
            varies[-1] = True
            repeats = repeats if len(varies) > 1 else 0
        elif token in ("*", "+") or (token.startswith("{") and token not in ("{", "{1}", "{0,1}")):
            if before not in ("*", "+", "?", "{}"):  # else it makes a repeat possessive
                if before == ")" and closed:
                    return True
                repeats += 1
                varies[-1] = True
        elif token == "?":
            varies[-1] = True
        before = "{}" if token.startswith("{") else token
        if repeats > MOST_REPEATS:
            return True
    return False
