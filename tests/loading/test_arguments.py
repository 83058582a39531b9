"""An argument of `from_pretrained` that nobody takes is found before anything is merged."""

from pathlib import Path

import pytest

from neuromerge_hf import (
    AutoMergedModel,
    MergeError,
    merge,
)
from tiny_models import save_bert, save_fine_tune, save_mixed

CPU = {"device": "cpu"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixed(tmp_path_factory.mktemp("models"))


@pytest.fixture
def no_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be merged."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a merge began")

    monkeypatch.setattr("neuromerge_hf.loading.auto.merge_spec", fail)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"density": 0.1}, "Did you mean config=NeuroIsoConfig(density=0.1)?"),
        ({"drop_rate": 0.5}, "Did you mean config=DARETIESConfig(drop_rate=0.5)?"),
        ({"weights": (1, 2)}, "Did you mean config=AverageConfig(weights=(1, 2))?"),
        ({"overwrite": True}, "it is one of `merge`"),
        ({"base": "base"}, "Did you mean 'base_model'?"),
        ({"device_mapp": "auto"}, "Did you mean 'device_map'?"),
        ({"subfolder": "x"}, 'write the folder into the id: "owner/name/folder"'),
        ({"quantisation_config": None}, "Did you mean 'quantization_config'?"),
        ({"nonsense": 1}, "has no argument 'nonsense'."),
    ],
)
@pytest.mark.usefixtures("no_merge")
def test_an_argument_that_nobody_takes_is_found_before_anything_is_merged(models, tmp_path, argument, message):
    experts, options = [models / "math"], {"base_model": models / "base", "merge_cache_dir": tmp_path, **CPU}
    with pytest.raises(TypeError) as caught:
        AutoMergedModel.from_pretrained(experts, **options, **argument)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("problem", [{}, {"base_model": "./missing"}])
@pytest.mark.usefixtures("no_merge")
def test_a_misspelt_argument_comes_before_the_problem_that_it_may_have_caused(models, problem):
    with pytest.raises(TypeError, match=r"has no argument 'base'\. Did you mean 'base_model'"):
        AutoMergedModel.from_pretrained([models / "math"], base=models / "base", **problem)
    with pytest.raises(MergeError, match="No base model"):
        AutoMergedModel.from_pretrained([models / "math"], output_attentions=True)


def test_arguments_of_the_class_and_the_configuration_are_passed_on(models, tmp_path):
    base = save_bert(tmp_path / "bert")
    expert = save_fine_tune(base, tmp_path / "expert", seed=1)
    model = AutoMergedModel.from_pretrained(
        [expert],
        base_model=base,
        merge_cache_dir=tmp_path / "cache",
        output_attentions=True,
        attn_implementation="eager",
        low_cpu_mem_usage=True,
        **CPU,
    )
    assert model.config.output_attentions


def test_an_unknown_argument_of_a_finished_merge_is_found_too(models, tmp_path):
    folder = merge([models / "math"], tmp_path / "merged", base_model=models / "base", **CPU).output_dir
    with pytest.raises(TypeError, match="has no argument 'densty'"):
        AutoMergedModel.from_pretrained(folder, densty=0.5)


def test_every_argument_that_transformers_takes_is_known():
    """Its source says which: a new one must be added to the table."""
    import inspect
    import re

    from transformers import PreTrainedModel

    from neuromerge_hf.loading.arguments import INSTEAD, OF_TRANSFORMERS

    function = PreTrainedModel.from_pretrained
    named = [name for name, each in inspect.signature(function).parameters.items() if each.kind is each.KEYWORD_ONLY]
    popped = re.findall(r'kwargs\.(?:pop|get)\("([a-z]\w*)"', inspect.getsource(function.__func__))
    ours = {"cache_dir", "revision"}  # which the downloads take
    assert {*named, *popped} - ours <= {*OF_TRANSFORMERS, *INSTEAD}
