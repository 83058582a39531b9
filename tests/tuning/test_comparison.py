"""Comparing methods: everything is evaluated on the same footing, and no winner is declared inside the noise."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from neuromerge_hf import (
    AutoMergedModel,
    AverageConfig,
    MergeError,
    NeuroMergingConfig,
    TIESConfig,
    TuningGrid,
    compare_methods,
    merge,
    tune_lambdas,
)
from neuromerge_hf.cli import app
from neuromerge_hf.config import METHODS, config_class
from neuromerge_hf.tuning.bootstrap import differences
from neuromerge_hf.tuning.compare import judge, label_of
from neuromerge_hf.tuning.evaluation import Scores
from tiny_models import load, load_adapted, logits, save_adapter, save_bert, save_fine_tune, save_llama

CPU = {"device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base, a fine-tune and an adapter of it."""
    folder = tmp_path_factory.mktemp("models")
    base = save_llama(folder / "base")
    return [base, save_fine_tune(base, folder / "math", seed=1), save_adapter(base, folder / "code", seed=2)]


def output_score(model: torch.nn.Module) -> float:
    """A number that tells models apart."""
    return float(logits(model).exp().mean())


# What is evaluated


def test_the_base_the_experts_and_each_method_are_evaluated(models: list[Path], tmp_path: Path) -> None:
    base, math, code = models
    found = compare_methods([math, code], output_score, base_model=base, **CPU)
    assert list(found.experts) == ["math", "code"]
    assert list(found.methods) == list(METHODS)
    assert found.base.average == pytest.approx(output_score(load(base)), rel=1e-5)
    assert found.experts["math"].average == pytest.approx(output_score(load(math)), rel=1e-5)
    assert found.experts["code"].average == pytest.approx(output_score(load_adapted(base, code)), rel=1e-5)
    for name in ("neuromerging", "pcb", "neuro_iso", "tsv"):
        merge([math, code], tmp_path / name, base_model=base, config=config_class(name)(), **CPU)
        assert found.methods[name].average == output_score(load(tmp_path / name))


def test_a_share_of_each_best_expert_is_retained(models: list[Path]) -> None:
    base, *experts = models

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        return {"out": output_score(model), "norm": float(model.lm_head.weight.norm())}

    found = compare_methods(experts, evaluate, base_model=base, methods=[AverageConfig()], **CPU)
    best = {task: max(scores.tasks[task] for scores in found.experts.values()) for task in ("out", "norm")}
    merged = found.methods["average"]
    assert found.retained(merged) == pytest.approx(sum(merged.tasks[task] / best[task] for task in best) / 2)


def test_methods_are_named_by_the_settings_that_are_not_the_defaults(models: list[Path]) -> None:
    base, *experts = models
    configs = [TIESConfig(), TIESConfig(density=0.5), NeuroMergingConfig(lambda_orthogonal=1.5)]
    found = compare_methods(experts, output_score, base_model=base, methods=configs, **CPU)
    assert list(found.methods) == ["ties", "ties (density 0.5)", "neuromerging (lambda_orthogonal 1.5)"]
    assert label_of(TIESConfig(scale=2, exclude=("a*",))) == "ties (scale 2, exclude ['a*'])"


# Winners


def scores(**by_example: list[float]) -> Scores:
    return Scores({task: float(np.mean(values)) for task, values in by_example.items()}, dict(by_example))


def noisy(mean: float, seed: int, count: int = 400) -> list[float]:
    return (np.random.default_rng(seed).random(count) < mean).astype(float).tolist()


def test_a_lead_beyond_the_noise_wins() -> None:
    methods = {"a": scores(x=noisy(0.9, 0), y=noisy(0.8, 1)), "b": scores(x=noisy(0.6, 2), y=noisy(0.5, 3))}
    intervals, winner, verdict = judge(methods)
    assert winner == "a"
    assert intervals["b"].low > 0
    assert "statistically significant" in verdict


def test_a_lead_within_the_noise_does_not() -> None:
    methods = {"a": scores(x=noisy(0.52, 0)), "b": scores(x=noisy(0.5, 1)), "c": scores(x=noisy(0.1, 2))}
    intervals, winner, verdict = judge(methods)
    best = max(methods, key=lambda name: methods[name].average)
    assert winner is None
    assert intervals["c"].low > 0
    assert "no winner is declared: its lead is within the noise over" in verdict
    assert "c" not in verdict.rpartition("over ")[2]
    assert best not in intervals


def test_pairs_of_examples_are_drawn_together() -> None:
    easy = noisy(0.5, 0)
    better = [min(1.0, value + (i % 40 == 0)) for i, value in enumerate(easy)]  # rarely better, never worse
    assert differences({"x": better}, {"b": {"x": easy}})["b"].low >= 0


def test_the_interval_is_that_of_the_mean_difference() -> None:
    first, second = np.random.default_rng(0).normal(0.3, 1, 2000), np.random.default_rng(1).normal(0, 1, 2000)
    interval = differences({"x": first.tolist()}, {"b": {"x": second.tolist()}})["b"]
    error = np.std(first - second) / np.sqrt(2000)
    mean = np.mean(first - second)
    assert interval.difference == pytest.approx(mean)
    assert (interval.low, interval.high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.1 * error)


def test_more_comparisons_need_larger_leads() -> None:
    best, other = {"x": noisy(0.6, 0)}, {"x": noisy(0.5, 1)}
    alone = differences(best, {"b": other})["b"]
    among = differences(best, dict.fromkeys("bcdefg", other))["b"]
    assert among.low < alone.low < alone.difference == among.difference


def test_without_scores_by_example_no_winner_is_declared(models: list[Path]) -> None:
    base, *experts = models
    found = compare_methods(experts, output_score, base_model=base, methods=[AverageConfig(), TIESConfig()], **CPU)
    assert (found.winner, found.intervals) == (None, {})
    assert "not known without scores by example" in found.verdict


# What is written


def test_the_table_is_written(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models

    def evaluate(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {"first": logits(model).flatten()[:50].abs(), "second": logits(model).flatten()[50:].abs()}

    configs = [AverageConfig(), TIESConfig()]
    found = compare_methods(experts, evaluate, base_model=base, methods=configs, output_dir=tmp_path / "table", **CPU)
    content = json.loads((tmp_path / "table" / "comparison.json").read_text())
    names = ["base", "expert math", "expert code", "average", "ties"]
    assert [model["name"] for model in content["models"]] == names
    assert content["verdict"] == found.verdict
    assert len(content["intervals"]) == 1
    text = (tmp_path / "table" / "comparison.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == names
    assert {line.count(" | ") for line in lines} == {5}
    assert text == str(found)
    assert (tmp_path / "table" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_replaces_an_earlier_one_and_nothing_else(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    table = tmp_path / "table"

    def compare() -> None:
        compare_methods(experts, output_score, base_model=base, methods=[AverageConfig()], output_dir=table, **CPU)

    compare()
    (table / "comparison.md").write_text("old")
    compare()
    assert "average" in (table / "comparison.md").read_text()
    (table / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in table.iterdir()}
    with pytest.raises(MergeError, match=r"no comparison wrote: notes\.txt"):
        compare()
    assert {path.name: path.read_bytes() for path in table.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["table"]


def test_a_table_that_cannot_be_completed_does_not_appear(models: list[Path], tmp_path: Path, monkeypatch) -> None:
    base, *experts = models

    def fail(*_: object) -> None:
        raise RuntimeError("no picture")

    monkeypatch.setattr("neuromerge_hf.tuning.comparison.draw_bars", fail)
    with pytest.raises(RuntimeError, match="no picture"):
        compare_methods(
            experts, output_score, base_model=base, methods=[AverageConfig()], output_dir=tmp_path / "table", **CPU
        )
    assert list(tmp_path.iterdir()) == []


def test_the_command_compares_by_a_function_of_the_user(models: list[Path], tmp_path: Path, monkeypatch) -> None:
    base, *experts = models
    (tmp_path / "my_comparison.py").write_text("def score(model):\n    return float(model.lm_head.weight.norm())\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    command = ["compare", *map(str, experts), "--base-model", str(base), "--eval", "my_comparison:score"]
    done = CliRunner().invoke(app, [*command, "--method", "ties", "--method", "average", "--output", "table"])
    assert done.exit_code == 0, done.output
    assert "| expert math |" in done.stdout
    assert "no winner is declared" in done.stdout
    assert (tmp_path / "table" / "comparison.md").read_text().strip() == done.stdout.strip()
    done = CliRunner().invoke(app, [*command, "--method", "slerp"])
    assert (done.exit_code, "'slerp' is not one of" in done.stderr) == (2, True)


# Heads


def test_each_task_is_evaluated_under_its_experts_own_head(tmp_path: Path) -> None:
    base = save_bert(tmp_path / "base")
    task = {"model_class": "BertForSequenceClassification", "num_labels": 3}
    topics = save_fine_tune(base, tmp_path / "topics", seed=3, **task)
    spam = save_adapter(base, tmp_path / "spam", seed=4, task_type="SEQ_CLS", **task)
    evaluate = {"topics": output_score, "spam": output_score}
    configs = [TIESConfig()]
    found = compare_methods([topics, spam], evaluate, base_model=base, methods=configs, **CPU)
    assert found.experts["topics"].tasks["topics"] == pytest.approx(output_score(load(topics)), rel=1e-5)
    spam_itself = load_adapted(base, spam, "BertForSequenceClassification", num_labels=3)
    assert found.experts["spam"].tasks["spam"] == pytest.approx(output_score(spam_itself), rel=1e-5)
    merge([topics, spam], tmp_path / "merged", base_model=base, config=TIESConfig(), **CPU)
    for name in evaluate:
        model = AutoMergedModel.from_pretrained(tmp_path / "merged", head=name, merge_cache_dir=tmp_path / "cache")
        assert found.methods["ties"].tasks[name] == pytest.approx(output_score(model), rel=1e-6)
    tuned = tune_lambdas([topics, spam], evaluate, base_model=base, grid=TuningGrid((0.0,), (1.0,), 0), **CPU)
    merge([topics, spam], tmp_path / "best", base_model=base, config=tuned.config, **CPU)
    model = AutoMergedModel.from_pretrained(tmp_path / "best", head="spam", merge_cache_dir=tmp_path / "cache")
    assert tuned.best.tasks["spam"] == pytest.approx(output_score(model), rel=1e-5)


@pytest.mark.parametrize("known", [[], ["topics"], ["spam", "topics"]])
@pytest.mark.parametrize("function", [compare_methods, tune_lambdas])
def test_an_evaluation_for_an_unknown_expert_names_the_known_ones(function, known: list[str], tmp_path: Path) -> None:
    base = save_bert(tmp_path / "base")
    task = {"model_class": "BertForSequenceClassification", "num_labels": 3}
    experts = [save_fine_tune(base, tmp_path / name, seed=seed, **task) for seed, name in enumerate(["topics", "spam"])]
    evaluate = dict.fromkeys([*known, "news"], output_score)
    with pytest.raises(MergeError) as caught:
        function(experts, evaluate, base_model=base, **CPU)
    message = "evaluate='news' names no expert with a head of its own. There are: spam, topics."
    assert str(caught.value) == message


def test_a_head_is_loaded_once_for_all_candidates(tmp_path: Path) -> None:
    base = save_bert(tmp_path / "base")
    topics = save_fine_tune(
        base, tmp_path / "topics", seed=3, model_class="BertForSequenceClassification", num_labels=3
    )
    models, scores = [], []

    def evaluate(model: torch.nn.Module) -> float:
        models.append(model)
        scores.append(output_score(model))
        return scores[-1]

    grid = TuningGrid((0.0, 1.0), (0.5, 1.0), 0)
    found = tune_lambdas([topics], {"topics": evaluate}, base_model=base, grid=grid, **CPU)
    assert len({id(model) for model in models}) == 1
    assert len(set(scores)) > 1
    assert models[0].bert is found.model


@pytest.mark.parametrize(
    ("option", "advice"),
    [
        ({"config": TIESConfig()}, "pass a list of configurations as methods="),
        ({"overwrite": True}, "the files of an earlier comparison are always replaced"),
        ({"max_shard_size": "1GB"}, "no merged model is kept"),
        ({"tuned_on": "dev"}, "no merged model is kept, and so no card that could name the data"),
    ],
)
def test_an_option_that_means_nothing_for_a_comparison_is_refused(option: dict, advice: str, tmp_path: Path) -> None:
    (name,) = option
    with pytest.raises(TypeError) as caught:
        compare_methods(["math"], output_score, output_dir=tmp_path / "table", **option)
    assert str(caught.value) == f"compare_methods has no argument {name!r}: {advice}."
    assert list(tmp_path.iterdir()) == []


def test_other_tasks_for_another_model_are_refused(models: list[Path]) -> None:
    base, *experts = models
    calls: list[int] = []

    def evaluate(model: torch.nn.Module) -> dict[str, list[float]]:
        calls.append(1)
        return {"x": [1.0] * (2 if len(calls) == 3 else 1)}

    with pytest.raises(MergeError, match=r"another number of examples for code than for the base: {'x': 2} and"):
        compare_methods(experts, evaluate, base_model=base, methods=[AverageConfig()], **CPU)
