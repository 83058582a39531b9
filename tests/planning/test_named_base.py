"""A plan says that an expert names another base than the one it is merged into, and nothing of other spellings."""

import json
import shutil
from pathlib import Path

import pytest

from changes import change_json, says
from loopback_hub import LoopbackHub
from neuromerge_hf import merge, plan_merge
from tiny_models import save_llama


def notes(expert: Path | str, base: Path | str) -> list[str]:
    return plan_merge([expert], base_model=base).experts[0].notes


def say(folder: Path, *, config: str | None = None, card: object = None) -> Path:
    """Let the metadata of a full checkpoint name its base."""
    if config is not None:
        change_json(folder / "config.json", _name_or_path=config)
    if card is not None:
        (folder / "README.md").write_text(f"---\nbase_model: {json.dumps(card)}\n---\n# A card\n")
    return folder


@pytest.mark.parametrize("name", ["someone/another-base", "someone/another-base@main", "someone/Base-v2"])
def test_an_adapter_that_names_another_base_gets_a_note(models: Path, copied, tmp_path: Path, name: str) -> None:
    adapter = copied("code")
    change_json(adapter / "adapter_config.json", base_model_name_or_path=name)
    (note,) = notes(adapter, models / "base")
    assert says(note, f"code says that it was trained from {name}; it is merged into base", "base_model=")
    assert f"Note: {note}" in str(plan_merge([adapter], base_model=models / "base"))
    report = merge([adapter], tmp_path / "merged", base_model=models / "base")
    assert report.notes == [note]


@pytest.mark.parametrize("said", [{"config": "some/other"}, {"card": "some/other"}, {"card": ["some/other", "a/b"]}])
def test_a_full_checkpoint_whose_metadata_names_another_base_gets_a_note(models: Path, copied, said) -> None:
    (note,) = notes(say(copied("math"), **said), models / "base")
    assert says(note, "math says that it was trained from some/other", "merged into base")


@pytest.mark.parametrize(
    "said",
    [
        {"config": ""},
        {"config": "some/base"},
        {"config": "SOME/Base"},
        {"config": "/home/them/models/base"},
        {"config": "C:\\models\\Base\\"},
        {"config": "some/base@v1.0"},
        {"config": "/home/them/.cache/hub/models--some--Base/snapshots/0123abcd"},
        {"config": "/gone/runs/checkpoint-500"},
        {"config": "output"},
        {"config": "me/math"},
        {"config": "~nobody-of-this-name/x"},
        {"config": "unsloth/base-unsloth-bnb-4bit"},
        {"config": "/gone/checkpoint-500", "card": "some/base"},
        {"config": "some/other", "card": ["a/b", "some/base"]},
        {"card": 7},
        {"card": {"a": "b"}},
    ],
    ids=str,
)
def test_other_names_of_the_base_and_names_that_tell_nothing_get_none(models: Path, copied, said) -> None:
    assert notes(say(copied("math"), **said), models / "base") == []


def test_a_damaged_card_is_no_obstacle(models: Path, copied) -> None:
    expert = copied("math")
    (expert / "README.md").write_bytes(b"---\nbase_model: [\n---\n\xff")
    assert notes(expert, models / "base") == []


def test_a_folder_of_this_machine_with_other_weights_gets_a_note(models: Path, copied, tmp_path: Path) -> None:
    other, copy = save_llama(tmp_path / "other", seed=9), Path(shutil.copytree(models / "base", tmp_path / "copy"))
    adapter = copied("code")
    change_json(adapter / "adapter_config.json", base_model_name_or_path=str(other))
    (note,) = notes(adapter, models / "base")
    assert says(note, "trained from other; it is merged into base")
    assert str(tmp_path) not in note
    change_json(adapter / "adapter_config.json", base_model_name_or_path=str(copy))
    assert notes(adapter, models / "base") == []


@pytest.mark.parametrize("described", ["card", "config"])
def test_a_folder_is_known_by_its_own_card_and_configuration(models: Path, copied, described: str) -> None:
    base, adapter = copied("base", "model"), copied("code")
    change_json(adapter / "adapter_config.json", base_model_name_or_path="makers/Tiny-Llama_1")
    assert len(notes(adapter, base)) == 1
    if described == "card":
        (base / "README.md").write_text("---\nlicense: mit\n---\n\n# Tiny Llama 1\n")
    else:
        change_json(base / "config.json", _name_or_path="makers/tiny-llama-1")
    assert notes(adapter, base) == []


def test_models_of_the_hub_are_compared_by_their_ids(hub: LoopbackHub, models: Path, publish, copied) -> None:
    publish("named", "base")
    adapter = copied("code")
    for name, count in {"named/base": 0, "mirror/Base": 0, "named/base-instruct": 1}.items():
        change_json(adapter / "adapter_config.json", base_model_name_or_path=name)
        assert len(notes(adapter, "named/base")) == count, name


def test_an_adapter_that_gives_the_base_itself_gets_no_note(models: Path) -> None:
    assert plan_merge([models / "code"]).experts[0].notes == []
