"""What a model's folder leads to, says and claims cannot reach the output, the terminal or the memory."""

import json
import logging
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from changes import change_json, says
from neuromerge_hf import MergeError, merge, merge_recipe, plan_merge
from neuromerge_hf.errors import printable
from neuromerge_hf.folder.parents import LONGEST_CITATION, Parent, citations
from neuromerge_hf.storage.location import locate
from neuromerge_hf.storage.small_files import LARGEST_CARD, leads_out
from tiny_models import contents

COPIED = [
    "LICENSE",
    "tokenizer.model",
    "chat_template.jinja",
    "config.json",
    "tokenizer.json",
    "generation_config.json",
]


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret"
    path.write_text("private")
    return path


# ---------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("name", COPIED)
@pytest.mark.parametrize("who", ["base", "math"])
def test_a_file_that_is_copied_and_leads_out_of_its_model_is_refused(models, copied, secret, refused, who, name):
    model = copied(who)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    folders = {"base": models / "base", "math": models / "math", who: model}
    message = refused([folders["math"]], base_model=folders["base"])
    assert says(message, model / name, "leads out of the model's folder", secret, "put a copy")


def test_links_through_other_links_and_linked_folders_are_followed(copied, secret):
    model = copied("math")
    (model / "inner").symlink_to(secret.parent)
    (model / "LICENSE").symlink_to("inner/secret")
    (model / "NOTICE").symlink_to("LICENSE")
    (model / "additional_chat_templates").symlink_to(secret.parent)
    (secret.parent / "x.jinja").write_text("private")
    with pytest.raises(MergeError, match="3 problems") as caught:
        locate(model)
    assert says(str(caught.value), "LICENSE", "NOTICE", "x.jinja")


def test_weights_may_be_links_to_another_disk_and_the_model_itself_a_link(models, copied, tmp_path):
    model = copied("math", "elsewhere")
    (model / "model.safetensors").rename(tmp_path / "big.safetensors")
    (model / "model.safetensors").symlink_to(tmp_path / "big.safetensors")
    (model / "notes").mkdir()
    (model / "notes" / "terms").write_text("terms")
    (model / "LICENSE").symlink_to("notes/terms")
    (tmp_path / "math").symlink_to(model)
    merge([tmp_path / "math"], tmp_path / "linked", base_model=models / "base")
    merge([models / "math"], tmp_path / "plain", base_model=models / "base")
    linked, plain = contents(tmp_path / "linked"), contents(tmp_path / "plain")
    assert linked["model.safetensors"] == plain["model.safetensors"]
    assert linked["LICENSE-math"] == b"terms"
    assert not (tmp_path / "linked" / "model.safetensors").is_symlink()


def test_a_snapshot_of_a_copied_cache_is_a_model_and_blobs_that_lead_out_are_none(models, tmp_path, secret):
    snapshot, blobs = tmp_path / "copy" / "snapshots" / "0123", tmp_path / "copy" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate((models / "math").iterdir()):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    merge([snapshot], tmp_path / "merged", base_model=models / "base")
    (blobs / "evil").symlink_to(secret)
    (snapshot / "LICENSE").symlink_to("../../blobs/evil")
    assert leads_out(snapshot / "LICENSE", snapshot) == secret
    (tmp_path / "copy" / "blobs").rename(tmp_path / "blobs")
    (tmp_path / "copy" / "blobs").symlink_to(tmp_path / "blobs")
    assert leads_out(snapshot / "config.json", snapshot) is not None


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "model.safetensors"])
def test_a_link_to_nothing_is_refused_rather_than_taken_for_no_file(models, copied, refused, name):
    model = copied("base")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("gone")
    assert says(refused([models / "math"], base_model=model), model / name, "is a link to gone, which does not exist")


def test_code_that_is_not_trusted_may_lead_anywhere_because_it_is_not_copied(models, copied, secret, tmp_path):
    model = copied("base")
    (model / "train.py").symlink_to(secret)
    merge([models / "math"], tmp_path / "merged", base_model=model)
    assert not (tmp_path / "merged" / "train.py").exists()
    with pytest.raises(MergeError, match=r"train\.py leads out"):
        plan_merge([models / "math"], base_model=model, trust_remote_code=True)


def test_a_parents_card_that_leads_out_is_not_read_and_costs_no_merge(models, copied, secret, tmp_path, caplog):
    model = copied("math")
    secret.write_text("---\nlicense: private\n---\n")
    (model / "README.md").unlink(missing_ok=True)
    (model / "README.md").symlink_to(secret)
    report = merge([model], tmp_path / "merged", base_model=models / "base")
    assert report.parents[1] == Parent()
    assert "README.md leads out of the model's folder" in caplog.text


# -------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../b", "..", "a\0b", ""])
def test_a_recipe_names_only_files_in_the_folders_of_its_models(models, tmp_path, name):
    merge([models / "math"], tmp_path / "merged", base_model=models / "base")
    recipe = tmp_path / "merged" / "recipe.yaml"
    text = recipe.read_text().replace("    config.json:", f"    {json.dumps(name)}:", 1)
    recipe.write_text(text)
    with pytest.raises(MergeError, match="is not in that folder") as caught:
        merge_recipe(recipe, tmp_path / "again")
    assert "blake3 is" not in str(caught.value)


# -------------------------------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize("name", ["pipeline", "PreTrainedModel", "AutoModel", "LlamaConfig", "utils"])
def test_what_is_no_model_class_of_transformers_is_refused(models, copied, refused, name):
    for who in ("base", "math"):
        model = copied(who, f"{who}-of-no-class")
        change_json(model / "config.json", architectures=[name])
        folders = {"base": models / "base", "math": models / "math", who: model}
        message = refused([folders["math"]], base_model=folders["base"])
        assert says(message, model / "config.json", name, "no model class of transformers")


# ---------------------------------------------------------------------------------------------------------------- texts


def test_texts_from_models_are_shown_on_one_line_without_what_acts_on_a_terminal():
    assert printable("a\x1b[31m\u202eb\nc\td\x9b\udce9 é 漢") == "a\\x1b[31m\\u202eb c d\\x9b\\udce9 é 漢"
    error = MergeError(["x\x1b", "y\nError: z"])
    assert str(error) == "2 problems were found:\n  * x\\x1b\n  * y Error: z"
    assert error.problems == ["x\\x1b", "y Error: z"]


def test_names_of_tensors_and_folders_cannot_act_on_the_terminal(models, copied, tmp_path):
    model = copied("math", "ma\x1b[31m\nth")
    weights = model / "model.safetensors"
    save_file({**load_file(weights), "x\x1b]0;t\x07": torch.zeros(1)}, weights, metadata={"format": "pt"})
    plan = plan_merge([model], base_model=models / "base")
    report = merge([model], tmp_path / "merged", base_model=models / "base")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert report.experts[0].name == "ma__31m_th"
    assert "x\\x1b]0;t\\x07" in str(plan)
    assert "x]0;t" in card
    for text in (str(plan), str(report), card):
        assert not {"\x1b", "\x07"} & set(text)


def test_control_characters_in_a_configuration_are_refused_before_a_library_shows_them(models, copied, refused):
    model = copied("math")
    change_json(model / "config.json", model_type="\x1b[31mllama")
    assert says(refused([model], base_model=models / "base"), "config.json has control characters", "model_type")


def test_a_name_that_is_no_unicode_is_refused_before_the_weights_are_read(models, copied, refused):
    model = copied("math")
    os.rename(model, os.fsencode(model) + b"\xff")
    assert says(refused([os.fsdecode(os.fsencode(model) + b"\xff")], base_model=models / "base"), "not valid UTF-8")
    other = copied("math", "other")
    (other / os.fsdecode(b"LICENSE\xff")).write_text("terms")
    assert says(refused([other], base_model=models / "base"), "LICENSE\\udcff", "Rename the file")
    assert says(refused(["a\0b"], base_model=models / "base"), "not valid UTF-8")


# ---------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("value", [20_000, 10**10])
@pytest.mark.parametrize("name", ["num_hidden_layers", "num_labels", "vocab_size", "hidden_size"])
def test_sizes_that_the_tensors_do_not_have_are_refused_at_once(models, copied, refused, name, value):
    for who in ("base", "math"):
        model = copied(who, f"{who}-{name}")
        change_json(model / "config.json", **{name: value})
        folders = {"base": models / "base", "math": models / "math", who: model}
        if name == "num_labels" and value < 10**6:
            continue
        started = time.process_time()
        message = refused([folders["math"]], base_model=folders["base"])
        assert time.process_time() - started < 15
        assert says(message, model)


def test_layers_are_compared_with_the_number_of_tensors_before_all_are_made(models, copied, refused):
    model = copied("base")
    change_json(model / "config.json", num_hidden_layers=20_000)
    message = refused([models / "math"], base_model=model)
    assert says(message, model / "config.json", "no LlamaForCausalLM can be made of it", "22,100", "num_hidden_layers")


def test_files_that_are_too_large_are_refused_with_the_limit(models, copied, refused):
    for name, limit in (("config.json", "16 MB"), ("LICENSE", "10 MB")):
        model = copied("math", name)
        with (model / name).open("a") as file:
            file.write(" " * 16_000_001)
        assert says(refused([model], base_model=models / "base"), model / name, f"more than the {limit}")


def test_files_on_the_hub_that_are_too_large_are_refused_before_they_are_downloaded(hub, models, copied, refused):
    model = copied("math")
    (model / "LICENSE").write_text(" " * 10_000_001)
    (model / "README.md").write_text(" " * (LARGEST_CARD + 1))
    hub.add_folder("large/math", model)
    hub.add_folder("large/base", models / "base")
    hub.forget_traffic()
    message = refused(["large/math"], base_model="large/base")
    assert says(message, "large/math/LICENSE has 10 MB, more than the 10 MB")
    assert not [name for name in hub.bytes_served if name.startswith("large/math")]


def test_a_card_on_the_hub_that_is_too_large_is_left_out(hub, models, copied, tmp_path, caplog):
    model = copied("math")
    (model / "README.md").write_text("---\nlicense: mit\n---\n" + " " * LARGEST_CARD)
    hub.add_folder("large-card/math", model)
    hub.forget_traffic()
    report = merge(["large-card/math"], tmp_path / "merged", base_model=models / "base")
    assert report.parents[1].license is None
    assert "The card of large-card/math is not read" in caplog.text
    assert hub.bytes_served["large-card/math/README.md"] == 0


# ----------------------------------------------------------------------------------------------------- cards of parents


@pytest.mark.parametrize(
    "text",
    [
        "---\na: " + "[" * 5000 + "\n---\n",
        "---\nx: !!python/object/apply:os.system [ls]\n---\n",
        "---\nlicense: *nothing\n---\n",
        "---\nx: \x00\n---\n",
        "x" * (LARGEST_CARD + 1),
    ],
)
def test_a_card_that_cannot_be_read_is_a_warning(copied, caplog, text):
    model = copied("math")
    (model / "README.md").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert Parent.of(locate(model)) == Parent()
    assert f"The card of {model} is not used" in caplog.text


def test_texts_of_cards_are_cut_and_have_no_invisible_characters(copied):
    model = copied("math")
    (model / "README.md").write_text(
        '---\nlicense: "m\\eit"\nlicense_name: "a\\u202e\\nb"\nlanguage: ["' + "x" * 900 + '"]\n---\n'
        "```bibtex\n@misc{x, title={\x1b[31mred}}\n```\n"
    )
    parent = Parent.of(locate(model))
    assert (parent.license, parent.license_name, parent.languages) == ("mit", "a b", ["x" * 500])
    assert parent.citations == ["@misc{x, title={[31mred}}"]


def test_citations_are_found_in_a_time_that_grows_with_the_length_of_the_card():
    started = time.process_time()
    assert citations("```bibtex\n@a{" * 70_000) == []
    assert citations("```" + " \n" * 490_000) == []
    assert citations("\n```bib\n@a{b}\n```\n```\n @c{d}\n```\n```python\n@e{f}\n```\n") == ["@a{b}", "@c{d}"]
    assert citations(f"```\n@a{{{'x' * LONGEST_CITATION}}}\n```\n") == []
    assert time.process_time() - started < 5
