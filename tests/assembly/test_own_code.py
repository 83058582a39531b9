"""Models whose class is in Python files beside their weights are merged as any others, where the user trusts them."""

import copy
import json
import pickle

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification
from typer.testing import CliRunner

from neuromerge_hf import (
    AutoMergedModel,
    MergeError,
    NeuroMergeCallback,
    NeuroMergingConfig,
    TuningGrid,
    compare_methods,
    merge,
    tune_lambdas,
)
from neuromerge_hf.cli import app
from neuromerge_hf.hub.push import push
from reference import EMBEDDING, LINEAR, merge_model
from tiny_models import disturb, logits, save_bert, seeded
from tiny_training import MERGED, logged, measure, train

CODE = {
    "configuration_tongue.py": """
from transformers import BertConfig


class TongueConfig(BertConfig):
    model_type = "tongue"
""",
    "modeling_tongue.py": """
import torch
from transformers import BertForSequenceClassification, BertModel

from .configuration_tongue import TongueConfig


class TongueModel(BertModel):
    config_class = TongueConfig


class TongueForSequenceClassification(BertForSequenceClassification):
    config_class = TongueConfig

    def __init__(self, config):
        super().__init__(config)
        self.volume = torch.nn.Linear(config.num_labels, config.num_labels)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask, token_type_ids, labels=labels, **kwargs)
        outputs.logits = self.volume(outputs.logits)
        return outputs
""",
}

SETTINGS = {
    "model_type": "tongue",
    "architectures": ["TongueForSequenceClassification"],
    "auto_map": {
        "AutoConfig": "configuration_tongue.TongueConfig",
        "AutoModel": "modeling_tongue.TongueModel",
        "AutoModelForSequenceClassification": "modeling_tongue.TongueForSequenceClassification",
    },
}

TRUSTED = {"trust_remote_code": True}


def load(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder, **TRUSTED).eval()


def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, two full fine-tunes of it and an adapter."""
    folder = tmp_path_factory.mktemp("models")
    base = save_bert(folder / "base", "BertForSequenceClassification")
    for name, code in CODE.items():
        (base / name).write_text(code)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | SETTINGS))
    with seeded(0):
        model = load(base)
        torch.nn.init.eye_(model.volume.weight)
        torch.nn.init.zeros_(model.volume.bias)
    model.save_pretrained(base)
    for seed, name in enumerate(("math", "chat")):
        with seeded(seed):
            model = load(base)
            disturb(model)
        model.save_pretrained(folder / name)
    with seeded(3):
        adapted = get_peft_model(load(base), LoraConfig(r=4, target_modules="all-linear"))
        disturb(adapted, trainable_only=True)
    adapted.save_pretrained(folder / "code")
    return [base, folder / "math", folder / "chat", folder / "code"]


@pytest.fixture(scope="module")
def merged(models, tmp_path_factory):
    base, *experts = models
    folder = tmp_path_factory.mktemp("merges") / "merged"
    merge(experts, folder, base_model=base, config=NeuroMergingConfig(), **TRUSTED)
    return folder


def test_code_that_is_not_trusted_is_not_run(models, tmp_path):
    base, *experts = models
    with pytest.raises(MergeError, match=r"(?s)math has a class of its own.*base has a class of its own.*trust_remote"):
        merge(experts, tmp_path / "merged", base_model=base)
    assert list(tmp_path.iterdir()) == []


def test_the_parameters_of_an_own_class_are_merged_as_the_equations_say(models, merged):
    base, math, chat = (tensors(folder) for folder in models[:3])
    adapted = PeftModel.from_pretrained(load(models[0]), models[3]).merge_and_unload().state_dict()
    code = {name: tensor for name, tensor in adapted.items() if not torch.equal(tensor, base[name])}
    neurons = {name: EMBEDDING if "embeddings" in name else LINEAR for name, theta in base.items() if theta.dim() == 2}
    expected, _ = merge_model(base, [math, chat, code], neurons, density=0.2, lambda_1=0.0)
    assert "volume.weight" in code
    for name, tensor in tensors(merged).items():
        torch.testing.assert_close(tensor, expected[name].float(), msg=name)


def test_the_code_goes_along_and_loads_the_merged_model(merged, hub):
    assert {name: (merged / name).read_text() for name in CODE} == CODE
    push(merged, "own/code")
    assert torch.equal(logits(load("own/code")), logits(load(merged)))


def test_the_quick_start_runs_as_it_is_pasted(merged, monkeypatch):
    _, metadata, body = (merged / "README.md").read_text().split("---\n", 2)
    code = body.partition("```python\n")[2].partition("```")[0]
    assert "trust_remote_code=True" in code
    assert yaml.safe_load(metadata)["pipeline_tag"] == "text-classification"
    monkeypatch.chdir(merged.parent)
    names = {}
    exec(code, names)
    assert torch.equal(logits(names["model"]), logits(load(merged)))


def test_the_merged_object_is_of_the_own_class(models, merged, tmp_path):
    base, *experts = models
    options = {"base_model": base, "config": NeuroMergingConfig(), **TRUSTED}
    model = AutoMergedModel.from_pretrained(experts, merge_cache_dir=tmp_path / "cache", **options)
    assert type(model).__name__ == "TongueForSequenceClassification"
    assert torch.equal(logits(model), logits(load(merged)))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))
    with torch.no_grad():
        model.volume.bias += 1
    model.save_pretrained(tmp_path / "changed")
    assert torch.equal(logits(load(tmp_path / "changed")), logits(model))


def test_an_own_head_is_put_on_as_the_card_says(models, tmp_path, monkeypatch):
    base, math, chat, _ = models
    backbone = AutoModel.from_pretrained(base, **TRUSTED)
    assert type(backbone).__name__ == "TongueModel"
    backbone.save_pretrained(tmp_path / "backbone")
    merge([math, chat], tmp_path / "merged", base_model=tmp_path / "backbone", **TRUSTED)
    blocks = (tmp_path / "merged" / "README.md").read_text().split("```python\n")[1:]
    monkeypatch.chdir(tmp_path)
    names = {}
    for block, name in zip(blocks, ("TongueModel", "TongueForSequenceClassification"), strict=True):
        exec(block.partition("```")[0], names)
        assert type(names["model"]).__name__ == name
    assert torch.equal(names["model"].volume.weight, load(math).volume.weight)


def test_an_auto_class_loads_the_own_class_and_saves_its_code(models, tmp_path):
    base, *experts = models
    model = AutoMergedModel.from_pretrained(
        experts,
        base_model=base,
        auto_class=AutoModelForSequenceClassification,
        merge_cache_dir=tmp_path / "cache",
        **TRUSTED,
    )
    assert type(model).__name__ == "TongueForSequenceClassification"
    with torch.no_grad():
        model.volume.bias += 1
    model.save_pretrained(tmp_path / "changed")
    assert {name for name in CODE if (tmp_path / "changed" / name).is_file()} == set(CODE)
    assert torch.equal(logits(load(tmp_path / "changed")), logits(model))


def test_candidates_are_evaluated_under_an_own_head(models, tmp_path):
    base, math, chat, _ = models
    backbone = AutoModel.from_pretrained(base, **TRUSTED)
    backbone.save_pretrained(tmp_path / "backbone")
    arguments = {"base_model": tmp_path / "backbone", **TRUSTED}

    def score(model):
        return logits(model).norm().item()

    found = tune_lambdas([math, chat], {"math": score}, grid=TuningGrid((0.0,), (0.5,), 0), **arguments)
    merged = AutoMergedModel.from_pretrained(
        [math, chat], config=found.config, head="math", merge_cache_dir=tmp_path / "cache", **arguments
    )
    assert type(merged).__name__ == "TongueForSequenceClassification"
    assert found.best.score == pytest.approx(score(merged), rel=1e-5)
    compared = compare_methods([math, chat], {"math": score}, methods=[found.config], **arguments)
    (scores,) = compared.methods.values()
    assert scores.tasks["math"] == pytest.approx(score(merged), rel=1e-5)


def test_the_card_says_how_to_reproduce_it(merged, tmp_path, monkeypatch):
    block = (merged / "README.md").read_text().partition("## Reproduce")[2].split("```")[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_bytes((merged / "recipe.yaml").read_bytes())
    command = block.strip().splitlines()[-1].split()
    assert CliRunner().invoke(app, command[1:]).exit_code == 0
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()


def test_methods_are_compared_and_lambdas_tuned(models, merged):
    base, *experts = models
    grid = TuningGrid(parallel=(0.0,), orthogonal=(0.5, 1.0), rounds=0)

    def volume(model):
        return model.volume.weight.sum().item()

    found = tune_lambdas(experts, volume, base_model=base, grid=grid, **TRUSTED)
    assert volume(found.model) == found.best.score
    compared = compare_methods(experts, volume, base_model=base, **TRUSTED)
    assert [*compared.methods["neuromerging"].tasks.values()] == [volume(load(merged))]


def test_the_command_line_merges_what_it_is_told_to_trust(models, merged, tmp_path):
    base, *experts = map(str, models)
    arguments = ["merge", *experts, "--base-model", base, "--output", str(tmp_path / "merged"), "--density", "0.2"]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 1
    assert "--trust-remote-code" in refused.output
    assert CliRunner().invoke(app, [*arguments, "--trust-remote-code"]).exit_code == 0
    assert torch.equal(logits(load(tmp_path / "merged")), logits(load(merged)))


@pytest.mark.parametrize("adapter", [False, True])
def test_what_was_trained_is_merged_and_evaluated(models, tmp_path, adapter):
    base, math, *_ = models
    model = load(base)
    if adapter:
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
    trainer = train(model, tmp_path, NeuroMergeCallback([math], **TRUSTED), eval_strategy="epoch")
    (metrics,) = logged(trainer, "merged_eval_loss")
    assert metrics["merged_eval_loss"] == pytest.approx(measure(load(tmp_path / MERGED))["loss"], abs=1e-5)
    assert metrics["merged_eval_loss"] != logged(trainer, "eval_loss")[0]["eval_loss"]
