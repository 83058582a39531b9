"""A loaded merge is pushed as the merge that it is, or as what it has become, and leaves nothing behind."""

import shlex
import shutil

import pytest
import torch
import transformers
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from neuromerge_hf import AutoMergedModel, MergeError, merge
from neuromerge_hf.cli import app
from tiny_models import contents, disturb, load, logits, merged_folder


def left_behind(cache) -> list[str]:
    return [path.name for path in (cache / "pushes").iterdir()] if (cache / "pushes").is_dir() else []


def test_an_unmodified_model_is_pushed_from_the_files_of_the_merge(hub, model, cache, monkeypatch):
    plain = transformers.LlamaForCausalLM
    monkeypatch.setattr(plain, "save_pretrained", None)  # it is not serialised again
    commit = model.push_to_hub("object/merged", commit_message="Mine", tags="tiny")
    assert commit.commit_message == "Mine"
    assert commit.oid == hub.repos["object/merged"].resolve("main")
    pushed = hub.files("object/merged")
    ours = contents(merged_folder(model))
    assert [name for name in ours if pushed[name] != ours[name]] == ["recipe.yaml"]
    assert {"merge", "tiny"} <= set(HfApi().model_info("object/merged").card_data.tags)
    assert not left_behind(cache)
    assert torch.equal(logits(plain.from_pretrained("object/merged")), logits(model))


def test_what_was_written_into_one_repositorys_card_does_not_get_into_another(hub, model):
    model.push_to_hub("object/one")
    card = hub.files("object/one")["README.md"] + b"\nOnly here.\n"
    HfApi().upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="object/one")
    model.push_to_hub("object/one")
    model.push_to_hub("object/other")
    assert b"Only here." in hub.files("object/one")["README.md"]
    assert b"Only here." not in hub.files("object/other")["README.md"]


def test_the_usual_arguments_work(hub, model):
    model.push_to_hub("object/usual", private=True, revision="next", max_shard_size="20KB", token="hf_mine")
    assert hub.repos["object/usual"].private
    assert "model.safetensors.index.json" in hub.files("object/usual", "next")
    assert "model.safetensors" not in hub.files("object/usual")
    commit = model.push_to_hub("object/usual", create_pr=True, commit_description="Why")
    assert commit.pr_num == 1
    assert torch.equal(logits(load("object/usual", "LlamaForCausalLM", revision="refs/pr/1")), logits(model))


def test_a_changed_model_is_pushed_as_such_and_leaves_nothing_behind(hub, model, cache):
    disturb(model)
    model.push_to_hub("object/changed")
    assert torch.equal(logits(load("object/changed")), logits(model))
    assert b'"changed": true' in hub.files("object/changed")["merge_report.json"]
    assert not left_behind(cache)


def test_a_changed_model_whose_push_fails_stays_on_disk(hub, model, cache):
    disturb(model)
    hub.fail("POST .*/commit/", 403, "no")
    with pytest.raises(MergeError, match="The model is complete in") as caught:
        model.push_to_hub("object/kept")
    (name,) = left_behind(cache)
    folder = cache / "pushes" / name
    assert str(folder) in str(caught.value)
    assert torch.equal(logits(load(folder)), logits(model))
    hub.forget_traffic()
    command = shlex.split(str(caught.value).rpartition("\n")[2])
    assert CliRunner().invoke(app, command[1:]).exit_code == 0
    assert torch.equal(logits(load("object/kept")), logits(model))
    shutil.rmtree(folder)


def test_a_changed_model_that_cannot_be_saved_leaves_nothing_behind(hub, model, cache, monkeypatch):
    disturb(model)
    with pytest.raises(MergeError, match="is no id of a repository"):
        model.push_to_hub("not an id")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", lambda *_: shutil.copy("none", "where"))
    with pytest.raises(OSError, match="none"):
        model.push_to_hub("object/unsaved")
    assert not left_behind(cache)
    assert "object/unsaved" not in hub.repos


def test_saving_with_push_to_hub_pushes_the_folder_with_our_card(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "object", push_to_hub=True, repo_id="object/saved", commit_message="Mine")
    assert "neuromerg" in hub.files("object/saved")["README.md"].decode().lower()
    assert (tmp_path / "object" / "README.md").read_bytes() == hub.files("object/saved")["README.md"]
    model.save_pretrained(tmp_path / "by-its-name", push_to_hub=True)
    assert "recipe.yaml" in hub.files("user/by-its-name")


def test_a_model_with_a_head_is_pushed_as_a_task_model(hub, load_merged):
    model = load_merged(head="topics")
    model.push_to_hub("object/task")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained("object/task")
    assert torch.equal(logits(plain), logits(model))
    assert b'"loaded_head": "topics"' in hub.files("object/task")["merge_report.json"]
    assert not any(name.startswith("heads/") for name in hub.files("object/task"))


def test_a_merge_on_the_hub_is_loaded_and_pushed_elsewhere_with_its_heads(hub, models, tmp_path):
    merge([models / "topics", models / "moods"], tmp_path / "merged", base_model=models / "encoder")
    hub.add_folder("object/source", tmp_path / "merged")
    for source in ("object/source", tmp_path / "merged"):
        model = AutoMergedModel.from_pretrained(source)
        assert isinstance(model, transformers.BertModel)
        name = f"object/from-{'hub' if source == 'object/source' else 'folder'}"
        model.push_to_hub(name)
        made, pushed = contents(tmp_path / "merged"), hub.files(name)
        assert [path for path in made if pushed[path] != made[path]] == ["recipe.yaml"]
    assert "object/source" not in hub.files("object/from-folder")["README.md"].decode()


def test_an_adapter_of_a_merge_on_the_hub_names_it_and_no_folder(hub, models, tmp_path):
    merge([models / "topics"], tmp_path / "merged", base_model=models / "encoder")
    hub.add_folder("object/base", tmp_path / "merged")
    adapted = get_peft_model(AutoMergedModel.from_pretrained("object/base"), LoraConfig(target_modules=["query"]))
    assert adapted.peft_config["default"].base_model_name_or_path == "object/base"
