"""The interactive page of an inspection: one HTML file that needs no other, and no network."""

import dataclasses
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from neuromerge_hf.folder.diagnostics import Diagnostics
from neuromerge_hf.folder.rounding import Rounding
from neuromerge_hf.text import kind_of

TEMPLATE = "page.html"

PLACE = "/* DATA */ null"
"""What the numbers replace in the template."""


def render_page(facts: Mapping[str, Any], diagnostics: Diagnostics, rounding: Rounding | None) -> str:
    """Return the page.

    Args:
        facts: the page's ``title``, the name of the ``base``, the ``kinds`` of the experts and the ``method``, or None.
        diagnostics: what was measured.
        rounding: what rounding left of the merged change.
    """
    parameters = [
        {**dataclasses.asdict(each), "excess": each.excess, "kind": _kind(each.name, each.layer)}
        for each in diagnostics.parameters
    ]
    data = {
        **facts,
        "verdict": diagnostics.verdict,
        "details": diagnostics.details,
        "trimmed": diagnostics.elected,
        "experts": [dataclasses.asdict(expert) for expert in diagnostics.experts],
        "cosines": diagnostics.cosines,
        "layers": [{**dataclasses.asdict(each), "excess": each.excess} for each in diagnostics.layers],
        "parameters": parameters,
        "neurons": [dataclasses.asdict(neuron) for neuron in diagnostics.neurons],
        "rounding": dataclasses.asdict(rounding) if rounding else None,
    }
    # "<" could end the script, and U+2028 a line of it.
    text = json.dumps(data, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
    template = (files("neuromerge_hf.model_cards") / TEMPLATE).read_text(encoding="utf-8")
    before, _, after = template.partition(PLACE)
    return f"{before}{text}{after}"


def _kind(parameter: str, layer: str) -> str:
    """The type of a parameter's module, which is its name inside the layer: "self_attn.q_proj.weight"."""
    return kind_of(parameter.removeprefix(f"{layer}."))
