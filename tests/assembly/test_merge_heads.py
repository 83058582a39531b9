"""With `merge_heads=True`, heads that the base lacks become their mean; heads that the base has merge anyway."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from typer.testing import CliRunner

from families import assert_same_bits, state
from neuromerge_hf import AutoMergedModel, MergeError, NeuroMergingConfig, merge, merge_recipe, plan_merge
from neuromerge_hf.cli import app
from tiny_models import contents, disturb, load, logits, save_bert, save_fine_tune, save_llama, seeded

GIVES_BACK = NeuroMergingConfig(density=1, lambda_parallel=1, lambda_orthogonal=1)
CPU = {"device": "cpu", "threads": 2}
LABELS = {0: "bad", 1: "good", 2: "unsure"}
NAMED = {"id2label": LABELS, "label2id": {name: number for number, name in LABELS.items()}}
TASK = "BertForSequenceClassification"
HEAD = ("classifier.bias", "classifier.weight")


def save_adapter(base: Path, folder: Path, seed: int, **changes) -> Path:
    """A LoRA adapter with its own head; a config.json beside it names the labels."""
    with seeded(seed):
        model = load(base, TASK, **changes)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
        disturb(adapted, trainable_only=True)
    adapted.save_pretrained(folder)
    model.config.architectures = [TASK]
    model.config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = save_bert(root / "base")
    save_fine_tune(base, root / "films", seed=1, model_class=TASK, **NAMED)
    save_fine_tune(base, root / "books", seed=2, model_class=TASK, **NAMED)
    save_adapter(base, root / "games", 3, **NAMED)
    save_fine_tune(base, root / "plain", seed=4)
    return root


def heads(*experts: Path) -> dict[str, list[torch.Tensor]]:
    return {name: [state(load(expert, TASK))[name] for expert in experts] for name in HEAD}


def test_heads_become_their_mean_in_the_model_itself(models, tmp_path):
    experts = [models / "films", models / "books", models / "plain"]
    plan = plan_merge(experts, base_model=models / "base", merge_heads=True)
    report = merge(experts, tmp_path / "merged", base_model=models / "base", merge_heads=True, **CPU)
    merged, loading = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(loading.values())
    assert merged.config.architectures == [TASK]
    assert (merged.config.id2label, merged.config.label2id, merged.config.num_labels) == (*NAMED.values(), 3)
    for name, theirs in heads(models / "films", models / "books").items():
        assert_same_bits(state(merged)[name], ((theirs[0].double() + theirs[1].double()) / 2).float())
    assert report.head == [*HEAD]
    assert not set(report.copied) & set(HEAD)
    for text in (str(plan), str(report)):
        assert "heads merged by their mean: classifier.bias, classifier.weight" in text
    assert [expert.head for expert in report.experts] == [[]] * 3
    assert not (tmp_path / "merged" / "heads").exists()


def test_merging_heads_changes_nothing_else(models, tmp_path):
    experts = [models / "films", models / "games"]
    for name, merge_heads in (("apart", False), ("merged", True)):
        merge(experts, tmp_path / name, base_model=models / "base", merge_heads=merge_heads, **CPU)
    apart, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("apart", "merged"))
    assert merged.keys() - apart.keys() == {*HEAD}
    for name, tensor in apart.items():
        assert_same_bits(merged[name], tensor)
    adapter = load_file(models / "games" / "adapter_model.safetensors")
    theirs = heads(models / "films")
    for name in HEAD:
        own = adapter[f"base_model.model.{name}"]
        torch.testing.assert_close(merged[name], (theirs[name][0] + own) / 2)


def test_one_expert_is_given_back_with_its_head(models, tmp_path):
    options = {"base_model": models / "base", "config": GIVES_BACK, "merge_cache_dir": tmp_path}
    model = AutoMergedModel.from_pretrained([models / "films"], merge_heads=True, **options)
    assert type(model).__name__ == TASK
    torch.testing.assert_close(logits(model), logits(load(models / "films")), rtol=0, atol=1e-5)
    apart = AutoMergedModel.from_pretrained([models / "films"], **options)
    assert type(apart).__name__ == "BertModel"


def test_merged_heads_get_the_dtype_that_is_asked_for(models, tmp_path):
    options = {"base_model": models / "base", "merge_heads": True, **CPU}
    merge([models / "films"], tmp_path / "half", dtype="float16", **options)
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}
    with torch.no_grad():
        load(models / "books").to(torch.bfloat16).save_pretrained(tmp_path / "books")
    merge([tmp_path / "books"], tmp_path / "auto", **options)
    made = load_file(tmp_path / "auto" / "model.safetensors")
    assert (made["classifier.weight"].dtype, made["pooler.dense.weight"].dtype) == (torch.bfloat16, torch.float32)


def test_a_head_of_a_decoder_is_merged_beside_the_bases_own(tmp_path):
    base = save_llama(tmp_path / "base")
    task = {"model_class": "LlamaForSequenceClassification", "num_labels": 2}
    experts = [save_fine_tune(base, tmp_path / f"expert-{seed}", seed=seed, **task) for seed in (1, 2)]
    merge(experts, tmp_path / "merged", base_model=base, merge_heads=True, **CPU)
    merged = load(tmp_path / "merged")
    assert type(merged).__name__ == "LlamaForSequenceClassification"
    scores = [state(load(expert))["score.weight"] for expert in experts]
    torch.testing.assert_close(state(merged)["score.weight"], (scores[0] + scores[1]) / 2)


def test_heads_that_the_base_has_are_merged_as_any_parameter(models, tmp_path):
    """They have task vectors: one expert is given back, and the same with `merge_heads`."""
    base = save_bert(tmp_path / "base", TASK, **NAMED)
    expert = save_fine_tune(base, tmp_path / "expert", seed=5)
    for name, merge_heads in (("one", False), ("other", True)):
        options = {"base_model": base, "config": GIVES_BACK, "merge_heads": merge_heads, **CPU}
        report = merge([expert], tmp_path / name, **options)
        assert {*HEAD} < set(report.merged)
        assert (report.head, report.experts[0].head) == ([], [])
        torch.testing.assert_close(logits(load(tmp_path / name)), logits(load(expert)), rtol=0, atol=1e-5)


def test_the_recipe_and_the_command_line_reproduce_every_byte(models, tmp_path):
    experts = [models / "films", models / "games"]
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    merge(experts, first, base_model=models / "base", merge_heads=True)
    merge_recipe(first / "recipe.yaml", second)
    arguments = ["merge", *experts, "--base-model", models / "base", "--merge-heads", "--output", third]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    assert "heads merged by their mean" in done.stdout
    assert contents(first) == contents(second) == contents(third)
    assert json.loads((first / "config.json").read_text())["architectures"] == [TASK]


def other_expert(models: Path, folder: Path, **changes) -> Path:
    return save_fine_tune(models / "base", folder, seed=6, **{"model_class": TASK, **changes})


REFUSED = {
    "another class": (
        {"model_class": "BertForTokenClassification", **NAMED},
        r"films is a \['BertForSequenceClassification'\], but .*other is a \['BertForTokenClassification'\]",
    ),
    "another shape": ({"num_labels": 2}, r"classifier.bias is \(3,\) in .*films, but \(2,\) in .*other"),
    "other labels": (
        {"id2label": {0: "good", 1: "bad", 2: "unsure"}},
        r"labels of .*films are \{0: 'bad', .*those of .*other are \{0: 'good', .*means something else",
    ),
}


@pytest.mark.parametrize(("changes", "match"), REFUSED.values(), ids=REFUSED)
def test_heads_that_differ_are_refused(models, tmp_path, changes, match):
    other = other_expert(models, tmp_path / "other", **changes)
    with pytest.raises(MergeError, match=f"heads cannot be merged: .*{match}.*Leave merge_heads out"):
        plan_merge([models / "films", other], base_model=models / "base", merge_heads=True)
    assert plan_merge([models / "films", other], base_model=models / "base").head is None


def test_a_damaged_head_is_refused(models, tmp_path):
    model = load(models / "films")
    model.classifier.weight.data[1, 2] = float("nan")
    model.save_pretrained(tmp_path / "damaged")
    with pytest.raises(MergeError, match=r"classifier.weight holds a NaN or an infinity \(.*damaged"):
        merge([tmp_path / "damaged"], tmp_path / "merged", base_model=models / "base", merge_heads=True, **CPU)
    assert not (tmp_path / "merged").exists()
