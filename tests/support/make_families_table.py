"""Writes docs/families.md from the tables of the tests (`make families`)."""

from pathlib import Path

from all_families import ALL_FAMILIES
from families import Family
from stored_forms import CASES

FILE = Path(__file__).parents[2] / "docs" / "families.md"

HEAD = """\
# Families that are checked

Made by `make families` from the tables of the tests; a test fails where it is not what they say.

For each row, tests/sources/test_families.py builds a tiny model with random weights and merges one expert with density
1 and both lambdas 1, once a full fine-tune and once a LoRA adapter. The merged model, loaded by plain transformers
without a missing or an unexpected key, must answer as the expert does, to 1e-4 in float32; the adapter's own answer is
that of PEFT, not merged. Merges of several experts are compared with a slow direct form of the method.

| model type | class | full | LoRA on |
|---|---|---|---|
"""

FORMS = """\

Base and experts may store their weights in different ways; the output is stored as the base is. Checked, with the base
or the experts in either way (tests/sources/test_stored_forms.py):

"""


def render() -> str:
    """The text of docs/families.md."""
    rows = (_row(name, family) for name, family in sorted(ALL_FAMILIES.items()))
    return HEAD + "".join(rows) + FORMS + "".join(f"* {case}\n" for case in CASES)


def _row(name: str, family: Family) -> str:
    targets = family.lora["target_modules"]
    lora = "all linear layers" if targets == "all-linear" else ", ".join(f"`{target}`" for target in targets)
    tied = ", tied embeddings" if name.endswith("-tied") else ""
    head = f", experts {family.expert_class.__name__}" if family.expert_class else ""
    return f"| {family.config.model_type}{tied} | {family.base_class.__name__}{head} | yes | {lora} |\n"


if __name__ == "__main__":
    FILE.write_text(render())
