"""A configuration with values of the wrong type is refused with its file, whatever other libraries raise on it."""

import json
import os
from contextlib import suppress

import pytest

from changes import change_json, says
from neuromerge_hf import AutoMergedModel, MergeError, add_results, merge, plan_merge
from neuromerge_hf.model_cards import write_card

WRONG = {
    "hidden_size": ["64", None, -1, [], 1.5, {}],
    "architectures": [5, "LlamaForCausalLM", [5], {}],
    "rope_parameters": [[], 5, {"rope_type": []}],
    "num_hidden_layers": ["2", None, -1],
    "vocab_size": ["40", None, [], 2**63],
    "model_type": [5, None, "", "unheard-of", []],
    "auto_map": [5, []],
    "quantization_config": [5, [1], {"quant_method": []}],
    "dtype": [5, "bfloat17", False],
    "pad_token_id": ["0", 10**9, []],
    "hidden_act": [5, "unheard-of"],
    "num_labels": [[], "x"],
    "id2label": [5, "x"],
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("who", ["base", "math"])
def test_a_setting_of_the_wrong_type_is_refused_with_its_file(models, copied, who, name):
    changed = copied(who)
    good = (changed / "config.json").read_text()
    for value in WRONG[name]:
        (changed / "config.json").write_text(good)
        change_json(changed / "config.json", **{name: value})
        others = {"base": models / "base", "math": models / "math", who: changed}
        with pytest.raises(MergeError) as caught:
            plan_merge([others["math"]], base_model=others["base"])
        assert says(str(caught.value), changed)


ADAPTER = {
    "lora_alpha": ["8", [], float("nan"), 10**320],
    "r": ["4", [], 0, 1.5],
    "alpha_pattern": [[], {"q_proj": "x"}, {"(": 1}, {"(a+)+$": 1}],
    "rank_pattern": [[], {"(": 1}, {"(.*)*x": 1}],
    "target_modules": [5, "(", r"(\w+)+$"],
    "modules_to_save": [5, "lm_head"],
    "base_model_name_or_path": [5, []],
    "revision": [5],
    "task_type": [5, []],
    "peft_type": [5, None, "UNHEARD_OF", []],
    "layers_pattern": [5, "("],
}


@pytest.mark.parametrize("name", ADAPTER)
def test_an_option_of_an_adapter_of_the_wrong_type_is_refused_with_its_file(models, copied, name):
    adapter = copied("code")
    good = (adapter / "adapter_config.json").read_text()
    for value in ADAPTER[name]:
        (adapter / "adapter_config.json").write_text(good)
        change_json(adapter / "adapter_config.json", **{name: value})
        with pytest.raises(MergeError) as caught:
            plan_merge([adapter], base_model=models / "base")
        assert says(str(caught.value), adapter, "adapter_config.json")


@pytest.mark.parametrize("version", ["main", "", "0.18.1.dev0@UNKNOWN", None])
def test_an_adapter_of_a_version_without_a_number_merges(models, copied, version):
    adapter = copied("code")
    change_json(adapter / "adapter_config.json", peft_version=version)
    assert plan_merge([adapter], base_model=models / "base").merged


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_a_companion_that_is_no_dictionary_is_refused_by_the_plan(models, copied, name):
    base = copied("base")
    for content in ("[]", "{", '{"a": 1, "a": 2}'):
        (base / name).write_text(content)
        with pytest.raises(MergeError) as caught:
            plan_merge([models / "math"], base_model=base)
        assert says(str(caught.value), base / name)


def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_refused_at_once(models, copied):
    for name in ("config.json", "adapter_config.json"):
        model = copied("code" if name.startswith("adapter") else "math", f"with-pipe-{name}")
        (model / name).unlink()
        os.mkfifo(model / name)
        with pytest.raises(MergeError, match=str(model)):
            plan_merge([model], base_model=models / "base")
        (model / name).unlink()
        (model / name).mkdir()
        with pytest.raises(MergeError, match=str(model)):
            plan_merge([model], base_model=models / "base")


def test_a_damaged_report_or_recipe_of_a_merge_is_refused_with_its_file(models, tmp_path):
    merged = tmp_path / "merged"
    merge([models / "math"], merged, base_model=models / "base", threads=1)
    report = json.loads((merged / "merge_report.json").read_text())
    for name in report:
        for value in (5, [5], {"a": []}):
            (merged / "merge_report.json").write_text(json.dumps(report | {name: value}))
            with suppress(MergeError):  # a few settings may have any value
                write_card(merged)
    (merged / "merge_report.json").write_text(json.dumps(report | {"weights": 5}))
    with pytest.raises(MergeError, match=r"merge_report\.json is not a report .* weights must be a dictionary"):
        add_results(merged, [])


ARGUMENTS = {
    "threads": [-1, 0, "4", 1.5, True, 10**9],
    "overwrite": ["yes", 1, None],
    "trust_remote_code": ["yes", None],
    "token": [5, []],
    "merge_heads": ["yes", 1],
    "tokenizer": [5, None],
    "chat_template": [5],
    "tuned_on": [5, []],
    "base_model": [5, [], b"x"],
    "device": ["meta", -(10**40)],
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_of_the_wrong_type_is_refused_by_its_name(models, name):
    for value in ARGUMENTS[name]:
        with pytest.raises(MergeError, match=f"^{name}"):
            plan_merge([models / "math"], **({"base_model": models / "base"} | {name: value}))


@pytest.mark.parametrize("function", [plan_merge, AutoMergedModel.from_pretrained])
def test_a_model_that_is_no_path_is_refused(models, function):
    for experts in ([None], [5], [b"x"], [["x"]], [""], ["~nouser/x"], ["x" * 300]):
        with pytest.raises(MergeError, match="model"):
            function(experts, base_model=models / "base")
