"""Weighted averages of experts, such as the checkpoints of one training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from changes import says
from families import assert_same_bits, state
from merged_models import read_tensors
from neuromerge_hf import AverageConfig, MergeError, compare_methods, merge, merge_recipe, plan_merge
from neuromerge_hf.cli import app
from tiny_models import contents, disturb, load, save_bert, save_fine_tune, seeded
from vocabularies import Models, by_text

CPU: dict[str, Any] = {"device": "cpu", "threads": 1}
TASK = "BertForSequenceClassification"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("average") / "base")


@pytest.fixture(scope="module")
def checkpoints(base: Path) -> list[Path]:
    """Three checkpoints of a classifier, each with its head."""
    return [save_fine_tune(base, base.parent / f"checkpoint-{step}", seed=step, model_class=TASK) for step in (1, 2, 3)]


def test_it_is_the_mean_of_the_checkpoints_whatever_the_base(base, checkpoints, tmp_path):
    tensors = [read_tensors(checkpoint) for checkpoint in checkpoints]
    config = AverageConfig(weights=(1, 2, 5))
    for start in (base, save_bert(tmp_path / "other", seed=9)):
        target = tmp_path / f"into-{start.name}"
        merge(checkpoints, target, base_model=start, config=config, merge_heads=True, **CPU)
        merged = state(load(target, TASK))
        assert merged.keys() == tensors[0].keys()
        for name, tensor in merged.items():
            one, two, three = (each[name].double() for each in tensors)
            torch.testing.assert_close(tensor.double(), (one + 2 * two + 5 * three) / 8, rtol=1e-6, atol=1e-7)


def test_equal_weights_are_the_plain_mean_to_the_last_bit(base, checkpoints, tmp_path):
    for name, weights in (("plain", None), ("equal", (1, 1, 1))):
        config = AverageConfig(weights=weights)
        merge(checkpoints, tmp_path / name, base_model=base, config=config, merge_heads=True, **CPU)
    plain, equal = (read_tensors(tmp_path / name) for name in ("plain", "equal"))
    for name, tensor in plain.items():
        assert_same_bits(equal[name], tensor, name)


def test_adapters_are_averaged_by_their_products(base, tmp_path):
    adapters, products = [], []
    for seed in (1, 2):
        with seeded(seed):
            model = get_peft_model(load(base), LoraConfig(r=2, target_modules=["query"]))
            disturb(model, trainable_only=True, scale=0.3)
        model.save_pretrained(str(tmp_path / f"adapter-{seed}"))
        adapters.append(tmp_path / f"adapter-{seed}")
        products.append(state(model.merge_and_unload()))
    merge(adapters, tmp_path / "merged", base_model=base, config=AverageConfig(weights=(1, 3)), **CPU)
    name = "encoder.layer.0.attention.self.query.weight"
    mean = (products[0][name].double() + 3 * products[1][name].double()) / 4
    torch.testing.assert_close(read_tensors(tmp_path / "merged")[name].double(), mean, rtol=1e-5, atol=1e-7)


def test_rows_of_new_tokens_have_the_same_weights(tmp_path):
    models = Models("llama", tmp_path)
    experts = [models / "chat", models / "tools"]
    config = AverageConfig(weights=(1, 3))
    merge(experts, tmp_path / "merged", base_model=models / "base", tokenizer="union", config=config, **CPU)
    merged, chat, tools = by_text(tmp_path / "merged"), by_text(experts[0]), by_text(experts[1])
    for name, rows in merged.items():
        both = (chat[name]["<|end|>"].double() + 3 * tools[name]["<|end|>"].double()) / 4
        torch.testing.assert_close(rows["<|end|>"].double(), both, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(rows["<|user|>"], chat[name]["<|user|>"], rtol=1e-6, atol=1e-7)


def test_a_weight_too_few_is_found_by_the_plan_with_all_other_problems(base, checkpoints, tmp_path):
    config = AverageConfig(weights=(0.2, 0.3, 0.5))
    with pytest.raises(MergeError) as error:
        plan_merge([checkpoints[0], tmp_path / "gone"], base_model=base, config=config)
    expected = "weights has 3 entries (0.2, 0.3, 0.5), but there are 2 experts. Give one for each, in their order."
    assert len(error.value.problems) == 2
    assert says(str(error.value), expected, tmp_path / "gone")
    with pytest.raises(MergeError, match="weights has 3 entries"):
        compare_methods(checkpoints[:2], lambda model: 1.0, base_model=base, methods=[config])


def test_recipe_report_and_card_tell_the_weights(base, checkpoints, tmp_path):
    config = AverageConfig(weights=[1, 2, 0.5])
    report = merge(checkpoints, tmp_path / "merged", base_model=base, config=config, merge_heads=True, **CPU)
    assert report.settings == {"weights": [1, 2, 0.5], "exclude": []}
    assert "method average, weights [1, 2, 0.5]" in str(report)
    assert "| `weights` | `1`, `2`, `0.5` |" in (tmp_path / "merged" / "README.md").read_text()
    merge_recipe(tmp_path / "merged" / "recipe.yaml", tmp_path / "again", **CPU)
    assert contents(tmp_path / "again") == contents(tmp_path / "merged")
    merge(checkpoints, tmp_path / "plain", base_model=base, config=AverageConfig(), **CPU)
    assert "| `weights` | equal weights |" in (tmp_path / "plain" / "README.md").read_text()


def test_weights_that_are_no_numbers_are_refused_by_the_command_line(base, checkpoints, tmp_path):
    arguments = ["merge", *map(str, checkpoints), "--base-model", str(base), "--output", str(tmp_path / "merged")]
    done = CliRunner().invoke(app, [*arguments, "--method", "average", "--weights", "1,two,3"])
    assert done.exit_code == 2
    assert "Invalid value for '--weights'" in done.stderr


def test_methods_are_compared_with_their_own_weights(base, checkpoints, tmp_path):
    seen = []

    def evaluate(model):
        seen.append(model.classifier.bias.detach().clone())
        return float(len(seen))

    first = AverageConfig(weights=(1e6, 1, 1))
    options: dict[str, Any] = {"base_model": base, "merge_heads": True}
    compare_methods(checkpoints, evaluate, methods=[AverageConfig(), first], **options, **CPU)
    heads = [read_tensors(checkpoint)["classifier.bias"] for checkpoint in checkpoints]
    torch.testing.assert_close(seen[-2], torch.stack(heads).mean(0))
    torch.testing.assert_close(seen[-1], heads[0], rtol=1e-4, atol=1e-5)
