"""A plan finds from metadata all that is wrong, before any weight is downloaded."""

import json
import os
import re
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from neuromerge_hf import AutoMergedModel, MergeError, NeuroMergingConfig, merge, plan_merge
from plans import size_of_weights, weights_served
from tiny_models import save_adapter, save_fine_tune, save_llama


def damage_shape(tensors):
    tensors["model.norm.weight"] = torch.zeros(31)


def drop_parameter(tensors):
    del tensors["model.norm.weight"]


def quantise(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)


def drop_factor(tensors):
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]


def shrink_factor(tensors):
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"] = torch.zeros(30, 4)


@pytest.mark.parametrize(
    ("name", "edit", "says"),
    [
        ("math", damage_shape, r"The shapes differ: model\.norm\.weight is \(31,\).*but \(32,\) in the base's"),
        ("math", drop_parameter, r"lacks the parameter model\.norm\.weight"),
        ("math", quantise, r"model\.norm\.weight is torch\.int8.*save the expert in float32"),
        ("code", drop_factor, r"only one of lora_A and lora_B of model\.layers\.0\.self_attn\.q_proj"),
        ("code", shrink_factor, r"lora_B \(30, 4\).*do not fit.*Check base_model"),
    ],
)
def test_what_a_header_tells_is_found_before_any_weight_is_downloaded(
    hub, models, publish, changed, tmp_path, name, edit, says
):
    expert = f"header-{edit.__name__}/{name}".replace("_", "-")
    hub.add_folder(expert, changed(name, edit))
    [base] = publish(expert.partition("/")[0], "base")
    for call in (plan_merge, lambda *args, **kwargs: merge(*args, tmp_path / "merged", **kwargs)):
        with pytest.raises(MergeError, match=says):
            call([expert], base_model=base)
    assert not (tmp_path / "merged").exists()
    assert len(weights_served(hub)) == 2
    for path, served in weights_served(hub).items():
        repository, _, file = path.rpartition("/")
        header = 8 + int.from_bytes(hub.files(repository)[file][:8], "little")
        assert served == 2 * header, "the header, for the plan and for the merge"


def test_a_file_that_is_no_safetensors_is_found_by_its_first_bytes(hub, models, publish, tmp_path):
    publish("pointer", "base")
    folder = shutil.copytree(models / "math", tmp_path / "math")
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1" * 1000)
    hub.add_folder("pointer/math", folder)
    with pytest.raises(MergeError, match=r"model\.safetensors is not a valid safetensors file .*Git LFS"):
        plan_merge(["pointer/math"], base_model="pointer/base")
    (folder / "model.safetensors").write_bytes((models / "math" / "model.safetensors").read_bytes()[:-4])
    hub.add_folder("pointer/math", folder)
    with pytest.raises(MergeError, match=r"model\.safetensors is truncated"):
        plan_merge(["pointer/math"], base_model="pointer/base")
    (folder / "model.safetensors").write_bytes(b"")
    hub.add_folder("pointer/math", folder)
    with pytest.raises(MergeError, match=r"model\.safetensors is truncated"):
        plan_merge(["pointer/math"], base_model="pointer/base")


def test_everything_that_is_wrong_is_in_one_error(hub, models, publish, changed, tmp_path):
    """A repository, a folder, a kind of adapter, an architecture, a header, an option and the output directory."""
    publish("wrong", "base", "math", "bert")
    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2).save_pretrained(tmp_path / "prompt")
    hub.add_folder("wrong/prompt", tmp_path / "prompt")
    hub.add_folder("wrong/shape", changed("math", damage_shape))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    hub.forget_traffic()
    experts = ["wrong/missing", "./gone", "wrong/prompt", "wrong/bert", "wrong/shape", "wrong/math"]
    arguments = {"base_model": "wrong/base", "config": NeuroMergingConfig(exclude=("decoder.*",)), "dtype": "int8"}
    expected = [
        r"full exists and is not empty.*overwrite=True",
        r"wrong/missing is neither a folder.*Check the spelling",
        r"\./gone is not a folder",
        r"wrong/prompt@\w+ is an adapter of type PROMPT_TUNING.*Leave it out",
        r"dtype must be",
        r"wrong/bert@\w+ is a bert model.*Only fine-tunes of the same base",
        r"The shapes differ: model\.norm\.weight.*check base_model",
        r"exclude=\['decoder\.\*'\] matches no parameter",
    ]
    with pytest.raises(MergeError) as planned:
        plan_merge(experts, output_dir=tmp_path / "full", **arguments)
    with pytest.raises(MergeError) as merged:
        merge(experts, tmp_path / "full", **arguments)
    for error in (planned.value, merged.value):
        assert len(error.problems) == len(expected)
        for problem, pattern in zip(error.problems, expected, strict=True):
            assert re.search(pattern, problem), (pattern, problem)
    with pytest.raises(MergeError) as loaded:
        AutoMergedModel.from_pretrained(experts, base_model="wrong/base")
    assert len(loaded.value.problems) == 5
    assert not [name for name, count in weights_served(hub).items() if count > 8000]


def test_a_missing_base_does_not_hide_what_is_wrong_with_the_experts(tmp_path):
    with pytest.raises(MergeError) as caught:
        plan_merge(["./gone"], base_model="nobody/base", output_dir=tmp_path)
    assert [problem.partition(" is ")[0] for problem in caught.value.problems] == ["./gone", "nobody/base"]


def test_an_output_that_would_replace_a_model_or_does_not_fit_is_found_by_the_plan(models, tmp_path, monkeypatch):
    base = shutil.copytree(models / "base", tmp_path / "base")
    with pytest.raises(MergeError, match="holds the model"):
        plan_merge([models / "math"], base_model=base, output_dir=base, overwrite=True)
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(MergeError, match=r"575 kB are needed, but only 1 kB are free in .*Free some space"):
        plan_merge([models / "math"], base_model=base, output_dir=tmp_path / "new" / "merged")
    assert not (tmp_path / "new").exists()


def test_an_output_inside_a_file_or_a_folder_that_may_not_be_written_is_found_by_the_plan(models, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "locked").mkdir(mode=0o500)
    outputs = [tmp_path / "notes.txt" / "merged"]
    if not os.access(tmp_path / "locked", os.W_OK):  # root may write everywhere
        outputs.append(tmp_path / "locked" / "merged")
    for output in outputs:
        with pytest.raises(MergeError, match=rf"{output} cannot be written: {output.parent}"):
            plan_merge([models / "math"], base_model=models / "base", output_dir=output)


def test_the_disk_must_hold_the_downloads_as_well(models, publish, tmp_path, monkeypatch):
    publish("disk", "base", "math")
    plan = plan_merge(["disk/math"], base_model="disk/base")
    assert (
        plan.disk_needed
        == size_of_weights(models / "base", models / "math") + plan.bytes_written + plan.costs.bytes_beside
    )
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, plan.disk_needed - 1))
    with pytest.raises(MergeError, match="No space on the disk"):
        plan_merge(["disk/math"], base_model="disk/base", output_dir=tmp_path / "merged")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, plan.disk_needed))
    plan_merge(["disk/math"], base_model="disk/base", output_dir=tmp_path / "merged")


def test_what_depends_on_values_is_found_after_the_download(hub, tmp_path):
    """Two copies of a tied parameter are compared, and the factors of an adapter are looked at."""
    base = save_llama(tmp_path / "base", tie_word_embeddings=True)
    expert = save_fine_tune(base, tmp_path / "math", seed=1)
    adapter = save_adapter(base, tmp_path / "code", seed=2)

    def untie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    def spoil(tensors):
        next(tensor for name, tensor in tensors.items() if "lora_A" in name)[0, 0] = float("nan")

    for folder, edit, says in ((expert, untie, "differ in"), (adapter, spoil, "holds a NaN or an infinity")):
        file = next(folder.glob("*.safetensors"))
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        hub.add_folder(f"values/{folder.name}", folder)
        plan_merge([f"values/{folder.name}"], base_model=base)
        with pytest.raises(MergeError, match=says):
            merge([f"values/{folder.name}"], tmp_path / "merged", base_model=base)
        assert not (tmp_path / "merged").exists()


def test_the_index_of_a_sharded_model_must_agree_with_the_headers_on_the_hub(hub, models, publish, tmp_path):
    publish("index", "base")
    folder = shutil.copytree(models / "sharded", tmp_path / "sharded")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["extra.weight"] = "model-00001-of-00004.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.add_folder("index/sharded", folder)
    with pytest.raises(MergeError, match=r"lists the tensor extra\.weight, but its file \S+ does not hold it"):
        plan_merge(["index/sharded"], base_model="index/base")
