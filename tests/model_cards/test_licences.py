"""Licences, notices, access and citations of all parents are told, and no agreement is made up."""

import dataclasses
import shutil

import pytest
import yaml

from cards import card_of, code_blocks, save_card, table_under, with_parents
from neuromerge_hf import AutoMergedModel, merge
from neuromerge_hf.folder.parents import Parent, is_gated
from neuromerge_hf.storage.location import locate


def test_metadata_that_the_hub_would_refuse_are_left_out(models, tmp_path):
    for name in ("base", "math"):
        shutil.copytree(models / name, tmp_path / name)
        save_card(
            tmp_path / name,
            license=["Apache 2.0"],
            language=["English", "en", "multilingual"],
            datasets=["/home/somebody/data.csv", "org/words", f"org/of-{name}"],
        )
    merge([tmp_path / "math"], tmp_path / "merged", base_model=tmp_path / "base")
    metadata, body = card_of(tmp_path / "merged")
    assert "license" not in metadata
    assert metadata["language"] == ["en", "multilingual"]
    assert metadata["datasets"] == ["org/of-math", "org/words"], "the base's own are on its card"
    assert "somebody" not in body
    assert [row[-1] for row in table_under(body, "Merged models")] == ["licence", "Apache 2.0", "Apache 2.0"]


def test_licences_that_differ_are_left_out_of_the_metadata_and_flagged(merged):
    metadata, body = with_parents(
        merged, Parent(license="apache-2.0"), Parent(license="cc-by-nc-sa-4.0"), Parent(license="gpl-3.0")
    )
    assert "license" not in metadata
    section = body.partition("## Licences")[2].partition("## ")[0]
    assert "**The licences differ.**" in section
    assert "The licence of `math` (cc-by-nc-sa-4.0) forbids commercial use." in section
    assert "The licence of `math` (cc-by-nc-sa-4.0) and `code` (gpl-3.0) asks that" in section


def test_a_licence_that_is_missing_is_no_agreement(merged):
    metadata, body = with_parents(merged, Parent(license="mit"), Parent(license="mit"), Parent())
    assert "license" not in metadata
    assert "No licence is stated by `code`" in body


def test_a_licence_with_a_name_of_its_own_needs_its_link_in_the_metadata(merged):
    own = Parent(license="other", license_name="tongue", license_link="https://example.org/tongue")
    metadata, body = with_parents(merged, own, own, own)
    expected = {"license": "other", "license_name": "tongue", "license_link": "https://example.org/tongue"}
    assert {key: metadata[key] for key in expected} == expected
    assert "(tongue) has conditions of its own" in body
    no_link = dataclasses.replace(own, license_link=None)
    assert "license" not in with_parents(merged, no_link, no_link, no_link)[0]


def test_a_licence_in_a_file_of_the_parents_is_linked_to_in_the_base(merged):
    own = Parent(license="other", license_name="tongue", license_link="LICENSE")
    recipe = yaml.safe_load((merged / "recipe.yaml").read_text())
    assert "license" not in with_parents(merged, own, own, own)[0], "no page has the file of a folder"
    open_one = dataclasses.replace(own, license="mit")
    metadata = with_parents(merged, open_one, open_one, open_one)[0]
    assert metadata["license"] == "mit"
    assert "license_link" not in metadata
    for place, path in {"org/base": "LICENSE", "org/base/small model": "small%20model/LICENSE"}.items():
        recipe["base_model"] = {"id": place, "revision": "1234abcd"}
        (merged / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        metadata = with_parents(merged, own, own, own)[0]
        assert metadata["license"] == "other"
        assert metadata["license_link"] == f"https://huggingface.co/org/base/blob/1234abcd/{path}"


def test_licences_and_notices_of_all_parents_go_along(models, tmp_path, hub):
    for name in ("base", "math", "code"):
        shutil.copytree(models / name, tmp_path / "parents" / name)
    base, math, code = (tmp_path / "parents" / name for name in ("base", "math", "code"))
    (base / "LICENSE").write_text("the base's licence")
    (base / "NOTICE.txt").write_text("the base's notice")
    (math / "license.md").write_text("the licence of math")
    (math / "license.py").write_text("code")
    hub.add_folder("org/with-licence", math)
    merge(["org/with-licence", code], tmp_path / "merged", base_model=base)
    terms = {
        "LICENSE-base": "the base's licence",
        "NOTICE-base.txt": "the base's notice",
        "license-with-licence.md": "the licence of math",
    }
    kept = {path.name: path.read_text() for path in (tmp_path / "merged").iterdir() if "ICE" in path.name.upper()}
    assert kept == terms
    section = card_of(tmp_path / "merged")[1].partition("## Licences")[2].partition("## ")[0]
    assert "is in `LICENSE-base`, `NOTICE-base.txt` and `license-with-licence.md`." in section
    AutoMergedModel.from_pretrained(tmp_path / "merged").push_to_hub("me/with-licences")
    assert terms.keys() <= hub.files("me/with-licences").keys()
    merge(["me/with-licences"], tmp_path / "again", base_model=base)
    assert (tmp_path / "again" / "license-with-licence-with-licences.md").read_text() == "the licence of math"


def test_gated_parents_are_named(merged):
    _, body = with_parents(merged, Parent(license="mit", gated=True), Parent(license="mit"), Parent(license="mit"))
    assert "Access to `base` is gated" in body
    assert table_under(body, "Merged models")[1][-1] == "mit, gated"


def test_whether_a_parent_is_gated_is_asked_of_the_hub(models, hub):
    hub.add_folder("org/gated-later", models / "base")
    location = locate("org/gated-later")
    assert not is_gated(location)
    hub.repos["org/gated-later"].gated = True
    assert is_gated(location)
    del hub.repos["org/gated-later"]
    assert not is_gated(location)  # it cannot be asked any more
    assert not is_gated(locate(models / "base"))


@pytest.mark.parametrize("text", ["", "no metadata", "---\n[1, 2\n---\n", "---\nlicense: [1]\nlanguage: {a: 1}\n---\n"])
def test_a_parents_card_that_cannot_be_read_says_nothing(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert Parent.of(locate(tmp_path)) == Parent()


def test_citations_of_the_parents_are_carried_over_once(tmp_path, models):
    entry = "@misc{math,\n  title = {Sums},\n}"
    for name in ("math", "code"):
        shutil.copytree(models / name, tmp_path / name)
        (tmp_path / name / "README.md").write_text(f"# x\n```bibtex\n{entry}\n```\n```bibtex\n@misc{{open, {{\n```\n")
    merge([tmp_path / "math", tmp_path / "code"], tmp_path / "merged", base_model=models / "base")
    blocks = code_blocks(card_of(tmp_path / "merged")[1], "bibtex")
    assert len(blocks) == 2
    assert "NeuroMerging" not in blocks[1]
    assert blocks[1] == f"{entry}\n"


def test_a_merge_of_a_merge_cites_each_paper_once(models, finished, tmp_path):
    merge([models / "code"], tmp_path / "merged", base_model=finished)
    cited = "".join(code_blocks(card_of(tmp_path / "merged")[1], "bibtex"))
    assert [cited.count(key) for key in ("{fang2025neuromerging,", "{marczak2025notaskleftbehind,")] == [1, 1]


def test_no_two_licences_share_a_name(models, tmp_path):
    """Not even where file systems ignore case."""
    texts = {"base": {}, "math": {"LICENSE": "one", "license": "two"}, "Math": {"LICENSE": "three"}}
    for name, licences in texts.items():
        shutil.copytree(models / name.lower(), tmp_path / "parents" / name)
        for file, text in licences.items():
            (tmp_path / "parents" / name / file).write_text(text)
    parents = tmp_path / "parents"
    merge([parents / "math", parents / "Math"], tmp_path / "merged", base_model=parents / "base")
    kept = {path.name: path.read_text() for path in (tmp_path / "merged").iterdir() if "ICE" in path.name.upper()}
    assert kept == {"LICENSE-math": "one", "license-math-2": "two", "LICENSE-Math-3": "three"}
