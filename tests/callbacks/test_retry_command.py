"""The command that an error prints makes the same merge, whatever its settings are."""

import shlex
from dataclasses import fields, replace
from pathlib import Path

import pytest
import typer.main

from neuromerge_hf import NeuroMergingConfig
from neuromerge_hf.callbacks.common.command import merge_command
from neuromerge_hf.cli import app
from neuromerge_hf.cli.common import merge_options
from neuromerge_hf.config import config_classes
from neuromerge_hf.spec import MergeSpec, Runtime, read_options

VALUES = {
    "exclude": ("*.bias", "a b*", "-x"),
    "density": 0.30000000000000004,
    "lambda_parallel": 1e-7,
    "lambda_orthogonal": "length",
    "weights": (0.1, 2.0),
    "scale": 1.25,
    "drop_rate": 0.125,
    "seed": 7,
}
"""Another value for each hyper-parameter of a method."""

SPEC = MergeSpec(
    models=["a b", "/an expert's folder", "us/math@0123abc"],
    base_model="base's",
    dtype="bfloat16",
    tokenizer="union",
    chat_template="math",
    merge_heads=True,
    max_shard_size="1GB",
    tuned_on="my 'texts' and\nmore",
)
RUNTIME = Runtime(device="cpu", threads=3, overwrite=True, trust_remote_code=True, token="hf_secret")


def parsed(command: str | None) -> tuple[MergeSpec, Runtime, Path]:
    """The merge that a command describes."""
    assert command
    program, name, *words = shlex.split(command)
    assert (program, name) == ("neuromerge", "merge")
    group = typer.main.get_group(app)
    context = group.commands[name].make_context(name, words)
    spec, runtime = read_options("merge", context.params["models"], merge_options(context))
    return spec, replace(runtime, token=None), context.params["output"]  # the token may come from the environment


@pytest.mark.parametrize("kind", config_classes(), ids=lambda kind: kind.method)
def test_the_command_has_every_setting(kind):
    values = {field.name: VALUES[field.name] for field in fields(kind)}
    if "weights" in values:
        values["weights"] = (0.1, 2.0, 3.0)
    for config in (kind(), kind(**values)):
        spec = replace(SPEC, config=config)
        found, runtime, output = parsed(merge_command(spec, RUNTIME, Path("/there/it is")))
        assert found == spec
        assert runtime == replace(RUNTIME, token=None)
        assert output == Path("/there/it is")


@pytest.mark.parametrize("value", ["auto", "length", 1.5, 0.0, -0.25])
def test_a_hyper_parameter_may_be_a_rule_or_a_number(value):
    spec = MergeSpec(models=["a"], config=NeuroMergingConfig(lambda_orthogonal=value, lambda_parallel=-1.0))
    assert parsed(merge_command(spec, Runtime(), Path("there")))[0] == spec


def test_the_defaults_need_no_options():
    spec = MergeSpec(models=["a"])
    assert parsed(merge_command(spec, Runtime(), Path("there")))[:2] == (spec, Runtime())


def test_folders_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-odd", "the base"):
        Path(name).mkdir()
    spec = MergeSpec(models=["-odd", "us/math"], base_model="the base", tokenizer="-odd")
    found = parsed(merge_command(spec, Runtime(), Path("there")))[0]
    assert found.models == (str(tmp_path / "-odd"), "us/math")
    assert (found.base_model, found.tokenizer) == (str(tmp_path / "the base"), str(tmp_path / "-odd"))
