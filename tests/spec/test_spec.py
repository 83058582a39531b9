"""What to merge and how to run it is said once: signatures, the command line, recipes and the cache's key follow."""

import inspect
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from typer.testing import CliRunner

from neuromerge_hf import (
    AutoMergedModel,
    MergeError,
    NeuroMergeCallback,
    NeuroMergingConfig,
    TIESConfig,
    compare_methods,
    merge,
    merge_recipe,
    plan_merge,
    tune_lambdas,
)
from neuromerge_hf.callbacks.common.settings import CallbackOptions, CallbackSettings
from neuromerge_hf.cli import app
from neuromerge_hf.options import option, options_of
from neuromerge_hf.spec import OPTION_NAMES, RUNTIME_NAMES, MergeOptions, MergeSpec, Runtime, RuntimeOptions

SPEC = MergeSpec(models=["math", "code"], base_model="base")

OTHERS = {
    "config": TIESConfig(),
    "dtype": "bfloat16",
    "tokenizer": "union",
    "chat_template": "math",
    "merge_heads": True,
    "max_shard_size": "1GB",
    "tuned_on": "my texts",
}
"""Another value for each setting of a spec."""

OF_MODELS = {"models", "names"}
"""The fields of a spec that the argument `models` sets."""

NOT_FOR_LOADING = {"dtype", "max_shard_size", "tuned_on", "overwrite"}

FUNCTIONS = {
    merge: set(OPTION_NAMES),
    plan_merge: set(OPTION_NAMES),
    merge_recipe: set(RUNTIME_NAMES),
    tune_lambdas: set(OPTION_NAMES),
    compare_methods: set(OPTION_NAMES) - {"config", "max_shard_size", "tuned_on", "overwrite"},
    AutoMergedModel.from_pretrained: set(OPTION_NAMES) - NOT_FOR_LOADING,
    NeuroMergeCallback.__init__: set(OPTION_NAMES) - {"overwrite"} | {field.name for field in fields(CallbackSettings)},
}
"""The functions that take options, and which."""


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__qualname__)
def test_help_and_completion_show_every_option_with_its_default(function):
    parameters = inspect.signature(function).parameters
    defaults = {each.name: each.default for kind in (MergeSpec, Runtime, CallbackSettings) for each in options_of(kind)}
    for name in FUNCTIONS[function]:
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == defaults[name]
        assert defaults[name] is not None or type(None) in get_args(parameters[name].annotation)
        assert re.search(rf"^    {name}: \w.*", function.__doc__, re.M), name
    own = {"output_dir", "evaluate"}  # which some functions have as arguments of their own
    shared = {*OPTION_NAMES, *(field.name for field in fields(CallbackSettings))}
    assert {name for name in parameters if name in shared} - own == FUNCTIONS[function] - own


@pytest.mark.parametrize(
    ("keywords", "names"),
    [
        (RuntimeOptions, {field.name for field in fields(Runtime)}),
        (MergeOptions, {field.name for kind in (MergeSpec, Runtime) for field in fields(kind)} - OF_MODELS),
        (
            CallbackOptions,
            {field.name for kind in (MergeSpec, Runtime, CallbackSettings) for field in fields(kind)} - OF_MODELS,
        ),
    ],
)
def test_the_keywords_that_type_checkers_know_are_the_fields(keywords, names):
    assert keywords.__optional_keys__ == names


@pytest.mark.parametrize(
    ("command", "left_out"),
    [("merge", set()), ("plan", set()), ("compare", {"overwrite", "max_shard_size", "tuned_on"})],
)
def test_every_option_is_on_the_command_line(command, left_out):
    done = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    shown = set(re.findall(r"--([a-z][a-z-]+)", re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)))
    wanted = {name.replace("_", "-") for name in OPTION_NAMES if name not in {"config", *left_out}}
    assert wanted <= shown
    assert not shown & {name.replace("_", "-") for name in left_out}


def test_an_option_that_is_not_known_is_an_error_that_names_the_nearest():
    with pytest.raises(TypeError, match=r"merge has no argument 'tokeniser'\. Did you mean 'tokenizer'\?"):
        merge(["math"], "merged", tokeniser="union")
    with pytest.raises(TypeError, match=r"plan_merge has no argument 'color'\.$"):
        plan_merge(["math"], color="red")
    with pytest.raises(TypeError, match=r"merge_recipe has no argument 'dtype'"):
        merge_recipe("recipe.yaml", "merged", dtype="float32")


def test_a_spec_is_what_it_was_after_it_was_written_down():
    for name, value in OTHERS.items():
        spec = replace(SPEC, **{name: value})
        assert MergeSpec.from_dict(spec.to_dict()) == spec


@dataclass(frozen=True, kw_only=True)
class NewerSpec(MergeSpec):
    """A spec with one more option."""

    new: str = option("old way", "an option that was added today")


def test_one_field_is_all_that_an_option_needs_to_reach_recipes_and_fingerprints():
    spec = NewerSpec(models=["math"], base_model="base", new="new way")
    assert spec.to_dict()["new"] == "new way"
    assert NewerSpec.from_dict(spec.to_dict()) == spec
    assert spec.fingerprint([1]) != replace(spec, new="old way").fingerprint([1])
    assert NewerSpec.from_dict(SPEC.to_dict()).new == "old way"


def test_the_fingerprint_tells_all_settings_and_models_apart():
    specs = [SPEC, *(replace(SPEC, **{name: value}) for name, value in OTHERS.items())]
    specs.append(replace(SPEC, config=NeuroMergingConfig(density=0.3)))
    specs.append(replace(SPEC, names=("sums", "python")))
    assert set(OTHERS) == {field.name for field in fields(MergeSpec)} - {"base_model"} - OF_MODELS
    prints = {spec.fingerprint(models) for spec in specs for models in ([1, 2], [1, 3], [2, 1])}
    assert len(prints) == 3 * len(specs)
    assert SPEC.fingerprint([1]) == replace(SPEC, base_model="./base", models=["./math", "./code"]).fingerprint([1])


def test_the_fingerprint_of_another_version_differs(monkeypatch):
    before = SPEC.fingerprint([1])
    monkeypatch.setattr("neuromerge_hf.spec.__version__", "999.0")
    assert SPEC.fingerprint([1]) != before


def test_paths_and_dtypes_become_text():
    spec = MergeSpec(models=[Path("a"), "b"], base_model=Path("c"), dtype=torch.bfloat16)
    assert spec == MergeSpec(models=("a", "b"), base_model="c", dtype="bfloat16")
    assert Runtime(device=torch.device("cpu")) == Runtime(device="cpu")


@pytest.mark.parametrize(
    ("given", "name"), [("half", "float16"), ("float", "float32"), (torch.half, "float16"), ("bfloat16", "bfloat16")]
)
def test_a_dtype_has_one_name(given, name):
    assert MergeSpec(models=["math"], dtype=given).dtype == name


def test_the_index_of_an_accelerator_stays_a_number():
    assert Runtime(device=0).device == 0


@pytest.mark.parametrize("models", [iter(["a", "b"]), {"a": 1, "b": 2}.keys(), ("a", "b")])
def test_models_may_come_from_any_iterable(models):
    assert MergeSpec(models=models).models == ("a", "b")


@pytest.mark.parametrize("models", ["math", Path("math"), {"math": 0.5}, 3, None, [3]])
def test_models_that_are_no_list_are_refused(models):
    with pytest.raises(MergeError, match="models must be a list of at least one fine-tune or adapter"):
        MergeSpec(models=models)


@pytest.mark.parametrize("config", [NeuroMergingConfig, 3, ["ties"]])
def test_a_config_is_an_instance_a_name_or_a_dictionary(config):
    with pytest.raises(MergeError, match="config must be a configuration"):
        MergeSpec(models=["math"], config=config)


def test_a_token_is_not_shown():
    assert "hf_secret" not in repr(Runtime(token="hf_secret"))
