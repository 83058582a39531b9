"""What people wrote into a card survives when the card is written again, and their templates are used."""

import pytest
import yaml

from cards import card_of, headings, with_parents
from neuromerge_hf import MergeError
from neuromerge_hf.folder.parents import Parent
from neuromerge_hf.model_cards import write_card


def test_text_around_the_card_and_added_metadata_survive(merged):
    path = merged / "README.md"
    metadata, body = card_of(merged)
    metadata |= {"tags": ["merge", "neuro_iso", "mine"], "thumbnail": "x.png", "license": "mit"}
    metadata["model-index"] = [{"name": "old", "results": []}]
    path.write_text(f"---\n{yaml.safe_dump(metadata)}---\nMy **own** words.\n{body}\nAnd more of them.\n")
    with_results = write_card(merged).read_text()
    new, text = card_of(merged)
    assert text.startswith("My **own** words.\n<!-- neuromerge")
    assert text.endswith("And more of them.\n")
    assert new["tags"] == ["merge", "neuro_iso", "mine"]
    assert new["thumbnail"] == "x.png"
    assert new["license"] == "apache-2.0", "the card knows that itself"
    assert "model-index" not in new
    assert write_card(merged).read_text() == with_results


def test_a_licence_that_somebody_chose_survives_but_an_agreement_that_is_none_any_more_does_not(merged):
    disagreeing = Parent(license="mit"), Parent(license="gpl-3.0"), Parent(license="mit")
    metadata, body = with_parents(merged, *disagreeing)
    assert "license" not in metadata
    (merged / "README.md").write_text(f"---\n{yaml.safe_dump(metadata | {'license': 'gpl-3.0'})}---\n{body}")
    assert with_parents(merged, *disagreeing)[0]["license"] == "gpl-3.0"


def test_a_card_that_is_all_hand_written_is_kept_below(merged):
    write_card(merged, previous="---\nlicense: mit\n---\n# My model\n\nWords.\n")
    _, body = card_of(merged)
    assert body.endswith("# My model\n\nWords.\n")
    assert headings(body)[0] == "merged"


def test_damaged_metadata_of_an_earlier_card_is_replaced(merged):
    write_card(merged, previous="---\n[1, 2\n---\nwords\n")
    metadata, body = card_of(merged)
    assert metadata["tags"] == ["merge", "neuro_iso"]
    assert body.endswith("words\n")


def test_sections_are_overridden_by_a_template_of_the_users(merged, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text(
        '{% extends "merge.md.jinja" %}{% block limits %}## Known flaws\n\nMany, {{ card.name }}.\n\n{% endblock %}'
        "{% block citation %}{% endblock %}"
    )
    write_card(merged, template=template)
    _, body = card_of(merged)
    assert "Many, merged." in body
    assert headings(body)[-2:] == ["Reproduce", "Known flaws"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% block x %}", "mine.jinja, line 1 cannot be used"),
        ("{{ card.nothing }}", "mine.jinja cannot be used: .*no attribute 'nothing'"),
        (None, "mine.jinja cannot be read: No such file"),
    ],
)
def test_a_template_that_does_not_work_is_named_and_the_card_stays(text, message, merged, tmp_path):
    template = tmp_path / "mine.jinja"
    if text is not None:
        template.write_text(text)
    before = (merged / "README.md").read_bytes()
    with pytest.raises(MergeError, match=message):
        write_card(merged, template=template)
    assert (merged / "README.md").read_bytes() == before


def test_a_heading_at_the_start_of_an_earlier_card_stays_a_heading(merged):
    write_card(merged, previous="---\nlicense: mit\n---\n# My words\n")
    assert headings(card_of(merged)[1])[-1] == "My words"
