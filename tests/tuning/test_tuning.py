"""Tuning: each candidate is the merge with its lambdas, and what is found is never worse than the automatic rule.

Scores are made of the weights or outputs of the live model itself, so that the best candidate is known.
"""

import gc
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch._subclasses import FakeTensor
from typer.testing import CliRunner

from families import Relatives
from neuromerge_hf import MergeError, NeuroMergingConfig, TIESConfig, TuningGrid, merge, merge_recipe, tune_lambdas
from neuromerge_hf.cli import app
from neuromerge_hf.tuning import tune as tuning
from neuromerge_hf.tuning.search import around
from tiny_models import contents, load, logits, save_adapter, save_fine_tune, save_llama

CPU = {"device": "cpu", "threads": 1}
SMALL = TuningGrid(parallel=(0.0, 0.7), orthogonal=(0.5, 1.0), rounds=0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base, a fine-tune and an adapter of it."""
    folder = tmp_path_factory.mktemp("models")
    base = save_llama(folder / "base")
    return [base, save_fine_tune(base, folder / "math", seed=1), save_adapter(base, folder / "code", seed=2)]


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


class Recorder:
    """An evaluation that keeps the weights of every candidate it sees; its score falls with the distance to `goal`."""

    def __init__(self, goal: torch.nn.Module | None = None):
        self.goal = state(goal) if goal else None
        self.seen: list[dict[str, torch.Tensor]] = []

    def __call__(self, model: torch.nn.Module) -> float:
        assert not model.training
        self.seen.append(state(model))
        if self.goal is None:
            return float(len(self.seen))
        return -sum(float((self.seen[-1][name] - tensor).square().sum()) for name, tensor in self.goal.items())


def assert_same_change(got: dict, want: dict, base: dict) -> None:
    for name, tensor in want.items():
        change = (tensor.double() - base[name].double()).norm()
        rounding = torch.finfo(tensor.dtype).eps * tensor.double().norm()
        assert (got[name].double() - tensor.double()).norm() <= 1e-6 * change + rounding / 2, name


# Candidates


@pytest.mark.parametrize(("name", "density"), [("gpt2", 0.2), ("mixtral", 0.2), ("bert", 1.0)])
def test_a_candidate_is_the_merge_with_its_lambdas(name: str, density: float, tmp_path_factory, tmp_path: Path) -> None:
    relatives = Relatives(name, tmp_path_factory.mktemp(name))
    experts = [relatives.full(0), relatives.adapter(1)]
    record = Recorder()
    config = NeuroMergingConfig(density=density)
    found = tune_lambdas(experts, record, base_model=relatives.base, config=config, grid=SMALL, **CPU)
    base = relatives.base_state()
    for trial, live in zip(found.trials, record.seen, strict=True):
        lambdas = {"lambda_parallel": trial.lambda_parallel, "lambda_orthogonal": trial.lambda_orthogonal}
        config = NeuroMergingConfig(density=density, **lambdas)
        merge(experts, tmp_path / "merged", base_model=relatives.base, config=config, overwrite=True, **CPU)
        assert_same_change(live, relatives.base_state(tmp_path / "merged"), base)


def test_candidates_of_untrimmed_adapters_are_merges_too(models: list[Path], tmp_path: Path) -> None:
    base, _, code = models
    other = save_adapter(base, tmp_path / "other", seed=5)
    record = Recorder()
    config = NeuroMergingConfig(density=1)
    found = tune_lambdas([code, other], record, base_model=base, config=config, grid=SMALL, **CPU)
    config = found.config
    merge([code, other], tmp_path / "merged", base_model=base, config=config, **CPU)
    assert_same_change(state(found.model), state(load(tmp_path / "merged")), state(load(base)))


def test_a_candidate_in_bfloat16_is_the_merge_rounded_once(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    found = tune_lambdas(experts, Recorder(), base_model=base, grid=SMALL, dtype="bfloat16", **CPU)
    merge(experts, tmp_path / "merged", base_model=base, config=found.config, dtype="bfloat16", **CPU)
    assert {tensor.dtype for tensor in found.model.parameters()} == {torch.bfloat16}
    got, want = state(found.model), state(load(tmp_path / "merged", dtype="bfloat16"))
    same = sum(int((got[name] == want[name]).sum()) for name in want)
    assert same >= 0.999 * sum(tensor.numel() for tensor in want.values())


def test_densities_are_tried_too_and_the_model_is_the_bests(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    record = Recorder(load(experts[0]))
    found = tune_lambdas(experts, record, base_model=base, grid=SMALL, densities=[1.0, 0.1], **CPU)
    assert {trial.density for trial in found.trials} == {1.0, 0.1}
    assert found.best.density == 1.0  # the fine-tune itself is nearer to all of the change
    best = found.trials.index(found.best)
    assert_same_change(state(found.model), record.seen[best], state(load(base)))
    merge(experts, tmp_path / "merged", base_model=base, config=found.config, **CPU)
    assert_same_change(state(found.model), state(load(tmp_path / "merged")), state(load(base)))


# The search


def test_it_is_never_worse_than_the_rule_and_finds_better(models: list[Path], tmp_path: Path, monkeypatch) -> None:
    base, *experts = models
    passes = []
    compute = tuning.LambdaComponents.compute

    def counted(*arguments: object) -> None:
        passes.append(1)
        compute(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tuning.LambdaComponents, "compute", counted)
    found = tune_lambdas(experts, Recorder(load(base)), base_model=base, **CPU)
    (rule,) = [trial for trial in found.trials if trial.is_rule]
    report = merge(experts, tmp_path / "rule", base_model=base, **CPU)
    assert (rule.lambda_parallel, rule.lambda_orthogonal) == (0.0, report.lambda_orthogonal)
    assert found.best.score == max(trial.score for trial in found.trials) > rule.score
    assert found.best.lambda_orthogonal < 0.5 * rule.lambda_orthogonal  # the base is the goal: the less, the better
    assert len({(trial.lambda_parallel, trial.lambda_orthogonal) for trial in found.trials}) == len(found.trials)
    assert 20 <= len(found.trials) <= 25
    assert len(passes) == 1  # no candidate reads the experts again


def test_where_nothing_is_better_the_rule_is_kept(models: list[Path]) -> None:
    base, *experts = models
    found = tune_lambdas(experts, lambda model: 1.0, base_model=base, grid=SMALL, **CPU)
    assert found.best.is_rule


def test_scores_that_should_be_small_are_made_small(models: list[Path]) -> None:
    base, *experts = models
    record = Recorder(load(base))
    small = tune_lambdas(
        experts, lambda model: -record(model), base_model=base, greater_is_better=False, grid=SMALL, **CPU
    )
    large = tune_lambdas(experts, Recorder(load(base)), base_model=base, grid=SMALL, **CPU)
    assert small.config == large.config


def test_of_several_scores_one_or_their_mean_counts(models: list[Path]) -> None:
    base, *experts = models

    def evaluate(model: torch.nn.Module) -> dict[str, list[float]]:
        size = float(sum(tensor.square().sum() for tensor in model.parameters()))
        return {"large": [size, size], "small": [-3 * size]}

    def best(metric: str | None) -> tuple[float, float]:
        found = tune_lambdas(experts, evaluate, base_model=base, grid=SMALL, metric=metric, **CPU)
        return found.best.lambda_orthogonal, found.best.score

    assert best("large")[0] > best("small")[0] == best(None)[0]
    with pytest.raises(MergeError, match="metric='f1' is not among what was evaluated: large, small"):
        best("f1")


@pytest.mark.parametrize(
    ("value", "tried", "expected"),
    [
        (1.0, [0.5, 1.0, 2.0], [1.0, 0.75, 1.5]),
        (1.0, [0.5, 1.0], [1.0, 0.75, 1.25]),
        (0.0, [0.0, 0.5], [0.0, -0.25, 0.25]),
        (1.0, [1.0], [1.0]),
    ],
)
def test_finer_steps_are_half_way_to_the_nearest(value: float, tried: list[float], expected: list[float]) -> None:
    assert around(value, tried) == expected


def test_memory_holds_no_more_than_the_model_and_two_task_vectors(models: list[Path]) -> None:
    base, *experts = models
    model_bytes = sum(tensor.nbytes for tensor in load(base).state_dict().values())

    def held() -> int:
        gc.collect()
        kinds = ((each, type(each)) for each in gc.get_objects())
        # torch.compile leaves fake tensors behind, which hold nothing.
        tensors = [each for each, kind in kinds if issubclass(kind, torch.Tensor) and not issubclass(kind, FakeTensor)]
        return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())

    before = held()
    during: list[int] = []
    tune_lambdas(experts, lambda model: during.append(held()) or 1.0, base_model=base, grid=SMALL, **CPU)
    assert max(during) - before <= 3 * model_bytes


# What is written


def test_the_best_merge_is_written_with_a_table_and_a_picture(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    output = tmp_path / "merged"
    found = tune_lambdas(
        experts, Recorder(load(base)), base_model=base, grid=SMALL, output_dir=output, tuned_on="dev split", **CPU
    )
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    content = yaml.safe_load((output / "recipe.yaml").read_text())
    assert (content["config"], content["tuned_on"]) == (found.config.to_dict(), "dev split")
    assert found.report is not None
    assert (found.report.tuned_on, json.loads((output / "merge_report.json").read_text())["tuned_on"]) == (
        "dev split",
        "dev split",
    )
    assert "tuned on dev split" in str(found.report)
    assert "`dev split`" in (output / "README.md").read_text()
    table = json.loads((output / "tuning.json").read_text())
    assert len(table["trials"]) == len(found.trials)
    assert table["best"] == table["trials"][0]
    assert "automatic rule" in (output / "tuning.md").read_text()
    merge_recipe(output / "recipe.yaml", tmp_path / "again", **CPU)
    again = contents(tmp_path / "again")
    assert again["recipe.yaml"] == (output / "recipe.yaml").read_bytes()
    assert again["model.safetensors"] == (output / "model.safetensors").read_bytes()
    assert_same_change(load_file(output / "model.safetensors"), state(found.model), state(load(base)))


def test_a_tuned_merge_appears_with_its_table_or_not_at_all(models: list[Path], tmp_path: Path, monkeypatch) -> None:
    base, *experts = models

    def fail(*_: object) -> None:
        raise RuntimeError("no picture")

    monkeypatch.setattr("neuromerge_hf.tuning.trials.draw_surface", fail)
    with pytest.raises(RuntimeError, match="no picture"):
        tune_lambdas(experts, Recorder(), base_model=base, grid=SMALL, output_dir=tmp_path / "merged", **CPU)
    assert list(tmp_path.iterdir()) == []


def test_a_tuned_merge_replaces_an_earlier_one_with_its_table(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    for _ in range(2):
        tune_lambdas(
            experts, Recorder(), base_model=base, grid=SMALL, output_dir=tmp_path / "merged", overwrite=True, **CPU
        )
    files = json.loads((tmp_path / "merged" / "merge_report.json").read_text())["files"]
    assert sorted(files) == sorted(path.name for path in (tmp_path / "merged").iterdir())
    assert {"tuning.json", "tuning.md", "tuning.png", "recipe.yaml"} <= set(files)


def test_the_surface_is_drawn(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    tune_lambdas(
        experts, Recorder(), base_model=base, grid=SMALL, densities=[0.2, 1], output_dir=tmp_path / "merged", **CPU
    )
    assert (tmp_path / "merged" / "tuning.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_tunes_by_a_function_of_the_user(models: list[Path], tmp_path: Path, monkeypatch) -> None:
    base, *experts = models
    (tmp_path / "my_tuning.py").write_text("def score(model):\n    return -float(model.lm_head.weight.norm())\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    command = ["merge", *map(str, experts), "--base-model", str(base), "--output", "merged"]
    done = CliRunner().invoke(app, [*command, "--tune", "my_tuning:score", "--tune-density", "0.3"])
    assert done.exit_code == 0, done.output
    assert "| best |" in done.stdout
    assert "tuned on my_tuning:score" in done.stdout
    content = yaml.safe_load((tmp_path / "merged" / "recipe.yaml").read_text())
    assert (content["config"]["density"], content["tuned_on"]) == (0.3, "my_tuning:score")


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tune", "my_tuning"], "write module:function"),
        (["--tune", "no_such_module:score"], "no_such_module:score cannot be imported"),
        (["--tune", "json:no_such_function"], "json:no_such_function cannot be imported"),
        (["--tune", "json:loads", "--method", "ties"], "config must be a NeuroMergingConfig"),
        (["--tune-density", "0.3"], "give --tune module:function"),
        (["--tune", "json:loads", "--tune-density", "3"], "density must be a number with 0 < density <= 1, not 3.0"),
    ],
)
def test_options_that_cannot_tune_are_refused(options: list[str], message: str, models, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["merge", str(models[2]), "--output", str(tmp_path / "merged"), *options])
    assert done.exit_code == 1
    assert message in done.stderr
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("returned", [None, float("nan"), "good", {}, {"a": None}, {"a": []}, [1.0, None], {3: 1.0}])
def test_what_is_no_score_is_refused(returned: object, models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="must return a finite number"):
        tune_lambdas(
            models[1:], lambda model: returned, base_model=models[0], output_dir=tmp_path / "merged", grid=SMALL, **CPU
        )
    assert not any(tmp_path.iterdir())


def test_another_methods_configuration_is_refused(models: list[Path]) -> None:
    with pytest.raises(MergeError, match=r"config must be a NeuroMergingConfig, not TIESConfig"):
        tune_lambdas(models[1:], logits, base_model=models[0], config=TIESConfig())  # type: ignore[arg-type]
