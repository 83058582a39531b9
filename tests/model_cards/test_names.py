"""No name breaks a card, and no card names a place on this machine."""

import json
import shutil

import pytest

from cards import add_settings, card_of, code_blocks, outline, table_under
from neuromerge_hf import merge
from neuromerge_hf.model_cards import write_card
from tiny_models import save_tokenizer

HOSTILE = [
    "pipe|in|the|name",
    "`code` and ``more``",
    "two\nlines\n\n# and a heading",
    "--- a: b",
    "<script>alert(1)</script>",
    "<!-- neuromerge: end mark -->",
    "\u202egnihtemos \u200bhidden",
    "[link](javascript:x) ![image](x)",
    "{{ card.recipe }} {% raw %}",
    "@everyone https://example.com $x$ :smile:",
    "no",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_breaks_the_yaml_or_the_markdown(name, merged):
    content = json.loads((merged / "merge_report.json").read_text())

    def render(word):
        for expert, place in zip(content["experts"], ("first", "second"), strict=True):
            expert |= {"name": f"{word} {place}", "kind": word, "ignored": [word]}
            for expert in content["diagnostics"]["experts"]:
                expert["name"] = word
        licence = {"license": "other", "license_name": word, "license_link": f"https://example.org/{word}"}
        content["parents"] = [{**licence, "task": word, "datasets": ["org/words", f"{word}/"]}] * 3
        content["notes"] = [word]
        content["tokenizer"] = word
        content["results"] = [{"model": "merged", "task": word, "metric": word, "value": 1, "split": word}]
        (merged / "merge_report.json").write_text(json.dumps(content))
        (merged / "README.md").unlink(missing_ok=True)
        write_card(merged, name=word)
        return card_of(merged)

    plain, plain_body = render("plain")
    metadata, body = render(name)
    assert metadata.keys() == plain.keys()
    assert metadata["license_name"] == name
    assert metadata["datasets"] == ["org/words"]
    assert outline(body) == outline(plain_body)
    assert [len(row) for row in table_under(body, "Merged models")] == [5, 5, 5, 5]
    assert not any(letter in body for letter in "\u202e\u200b")
    write_card(merged, name=name)
    assert card_of(merged) == (metadata, body), "the markers are found again"


def test_a_folder_of_any_name_is_quoted_in_the_quick_start(finished, tmp_path, monkeypatch):
    name = "a \"quoted\" 'name' ü 😀 $(x)"
    shutil.copytree(finished, tmp_path / name)
    (code, _) = code_blocks(card_of((write_card(tmp_path / name)).parent)[1], "python")
    monkeypatch.chdir(tmp_path)
    exec(code, {})


def test_nothing_that_is_published_names_a_place_on_this_machine(models, tmp_path, hub):
    math = shutil.copytree(models / "math", tmp_path / "math")
    base = shutil.copytree(models / "base", tmp_path / "base")
    save_tokenizer(math)
    add_settings(math / "tokenizer_config.json", name_or_path=str(math), special_tokens_map_file=f"{math}/map.json")
    add_settings(base / "config.json", _name_or_path=str(base), teacher={"_name_or_path": str(base)})
    report = merge([math, models / "code"], tmp_path / "merged", base_model=base, tokenizer=str(math))
    secrets = [str(models), str(tmp_path), str(models.parent)]
    for path in (tmp_path / "merged").rglob("*"):
        if path.is_file() and path.name != "recipe.yaml":  # which is published without them, see test_recipe.py
            assert not any(secret.encode() in path.read_bytes() for secret in secrets), path
    assert str(tmp_path) in str(report), "on the screen, the place is what one wants to know"


def test_two_models_of_one_name_are_told_apart(models, tmp_path):
    for side in "ab":
        shutil.copytree(models / "math", tmp_path / side / "base")
    merge([tmp_path / "a/base", tmp_path / "b/base"], tmp_path / "merged", base_model=models / "base")
    assert "Not on the Hub are `base-base`, `base` and `base-2`." in (tmp_path / "merged/README.md").read_text()
