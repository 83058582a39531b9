"""Python, recipe, command line and cache choose a tokenizer in the same way, and by any name of its model."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from neuromerge_hf import AutoMergedModel, MergeError, merge, merge_recipe
from neuromerge_hf.cli import app
from tiny_models import contents
from vocabularies import CPU, TOOL, make_tokenizer


def test_the_recipe_and_the_command_line_reproduce_every_byte(models, tmp_path):
    experts = [models / "chat", models / "tools"]
    for tokenizer in ("union", "chat", str(models / "tools")):
        first, second, third = (tmp_path / Path(tokenizer).name / name for name in ("first", "second", "third"))
        merge(experts, first, base_model=models / "base", tokenizer=tokenizer)
        merge_recipe(first / "recipe.yaml", second)
        arguments = [*experts, "--base-model", models / "base", "--tokenizer", tokenizer, "--output", third]
        done = CliRunner().invoke(app, ["merge", *map(str, arguments)])
        assert done.exit_code == 0, done.output
        assert "aligned with the base's" in done.stdout
        assert contents(first) == contents(second) == contents(third)
        for name, data in contents(first).items():
            assert str(tmp_path).encode() not in data, name
            assert name == "recipe.yaml" or str(models.root).encode() not in data, name


def test_a_recipe_notices_another_tokenizer_of_an_expert(models, tmp_path):
    expert = shutil.copytree(models / "chat", tmp_path / "chat")
    merge([expert], tmp_path / "merged", base_model=models / "base")
    make_tokenizer(added=TOOL).save_pretrained(expert)
    with pytest.raises(MergeError, match=r"chat/tokenizer\.json has changed"):
        merge_recipe(tmp_path / "merged" / "recipe.yaml", tmp_path / "again")


def test_each_tokenizer_has_its_own_merge_in_the_cache(models, tmp_path):
    def rows(**options) -> int:
        experts, options = [models / "chat", models / "tools"], {"base_model": models / "base", **options}
        return AutoMergedModel.from_pretrained(experts, merge_cache_dir=tmp_path, **options).config.vocab_size

    assert (rows(), rows(tokenizer="union"), rows(tokenizer="chat")) == (14, 16, 17)
    assert len(list(tmp_path.iterdir())) == 3


def test_an_expert_on_the_hub_is_chosen_by_its_id(hub, models, tmp_path):
    hub.add_folder("vocabularies/chat", models / "chat")
    for name, tokenizer in (("id", "vocabularies/chat"), ("revision", "vocabularies/chat@main"), ("name", "chat")):
        merge(["vocabularies/chat@main"], tmp_path / name, base_model=models / "base", tokenizer=tokenizer, **CPU)
        assert (tmp_path / name / "tokenizer.json").read_bytes() == ((models / "chat") / "tokenizer.json").read_bytes()
        merge_recipe(tmp_path / name / "recipe.yaml", tmp_path / f"{name}-again")
