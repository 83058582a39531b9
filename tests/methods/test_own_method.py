"""A method of one's own: ten lines, which merge, and tell of themselves in report, recipe and card."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from neuromerge_hf import MergeError, NeuroMergingConfig, merge, merge_recipe, plan_merge
from neuromerge_hf.config import METHODS, MergeConfig, config_class, config_classes
from neuromerge_hf.engine.method import Method, Recorder, add_change
from neuromerge_hf.methods.neuromerging import NeuroMerging
from neuromerge_hf.options import options_of
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.layout import Block
from tiny_models import contents, save_fine_tune, save_llama

CPU = {"device": "cpu", "threads": 1}
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class MedianConfig(MergeConfig):
    method = "median"
    title = "the median"
    paper = "https://example.com/median"
    summary = "Every weight changes by the median of the fine-tunes' changes."


class Median(Method[MedianConfig], config=MedianConfig):
    def merge_block(self, x: Tensor, unit: Unit, block: Block, record: Recorder) -> Tensor:
        return add_change(x[0], x[1:].median(0).values)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("own") / "base")


@pytest.fixture(scope="module")
def experts(base: Path) -> list[Path]:
    return [save_fine_tune(base, base.parent / f"expert-{seed}", seed=seed) for seed in (1, 2, 3)]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "median", f"{__name__}:MedianConfig")


def test_it_merges(base: Path, experts: list[Path], tmp_path: Path) -> None:
    merge(experts, tmp_path / "merged", base_model=base, config=MedianConfig(exclude=("*norm*",)), **CPU)
    ours, theirs = load_file(base / WEIGHTS), [load_file(expert / WEIGHTS) for expert in experts]
    for name, merged in load_file(tmp_path / "merged" / WEIGHTS).items():
        change = torch.stack([weights[name] - ours[name] for weights in theirs]).median(0).values
        assert torch.equal(merged, ours[name] if "norm" in name else ours[name] + change)


def test_report_and_card_tell_of_it(base: Path, experts: list[Path], tmp_path: Path) -> None:
    report = merge(experts, tmp_path / "merged", base_model=base, config=MedianConfig(), **CPU)
    assert (report.method, report.settings) == ("median", {"exclude": []})
    assert "method median" in str(report)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "[the median](https://example.com/median)." in card
    assert f"## Method\n\n{MedianConfig.summary}\n" in card
    assert "The method is that of https://example.com/median." in card


@pytest.mark.usefixtures("registered")
def test_its_recipe_makes_the_model_again(base: Path, experts: list[Path], tmp_path: Path) -> None:
    merge(experts, tmp_path / "merged", base_model=base, config=MedianConfig(), **CPU)
    merge_recipe(tmp_path / "merged" / "recipe.yaml", tmp_path / "again", **CPU)
    assert contents(tmp_path / "again") == contents(tmp_path / "merged")


def test_a_recipe_of_a_method_that_is_not_registered_is_refused(base: Path, experts: list[Path], tmp_path: Path):
    merge(experts, tmp_path / "merged", base_model=base, config=MedianConfig(), **CPU)
    with pytest.raises(MergeError, match=r"method must be one of neuromerging, .*, not 'median'"):
        merge_recipe(tmp_path / "merged" / "recipe.yaml", tmp_path / "again", **CPU)


def test_a_configuration_without_a_method_is_refused(base: Path, experts: list[Path], tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Orphan(MergeConfig):
        method = title = summary = "orphan"
        paper = "https://example.com/orphan"

    with pytest.raises(MergeError, match=r"No method is known for Orphan: define .*config=Orphan"):
        merge(experts, tmp_path / "merged", base_model=base, config=Orphan(), **CPU)
    assert not (tmp_path / "merged").exists()


def test_a_configuration_that_says_nothing_of_its_method_is_refused() -> None:
    with pytest.raises(TypeError, match="Silent lacks the class attributes title, paper, summary"):

        class Silent(MergeConfig):
            method = "silent"


@dataclass(frozen=True)
class RenamedConfig(NeuroMergingConfig):
    method = "renamed"
    title = "another name"
    citation = "@misc{renamed}"


class Renamed(NeuroMerging, config=RenamedConfig):
    pass


def test_what_is_reported_does_not_depend_on_the_name(base: Path, experts: list[Path], tmp_path: Path) -> None:
    found = []
    for config in (NeuroMergingConfig(lambda_orthogonal="length"), RenamedConfig(lambda_orthogonal="length")):
        folder = tmp_path / config.method
        plan = plan_merge(experts, base_model=base, config=config, **CPU)
        report = merge(experts, folder, base_model=base, config=config, **CPU)
        card = (folder / "README.md").read_text()
        parameters = card[card.index("## Parameters") : card.index("## Reproduce")]
        found.append((plan.costs, report.diagnostics, report.sigma, report.settings, report.experts, parameters))
    assert found[0] == found[1]
    assert "## Citation\n\n```bibtex\n@misc{renamed}\n```\n" in card
    assert "`length` (a rule of neuromerge_hf, not the paper's), which gave " in card


# Those of this library


def test_every_configuration_describes_its_method_and_its_options() -> None:
    assert [kind.method for kind in config_classes()] == list(METHODS)
    for kind in config_classes():
        assert config_class(kind.method) is kind
        assert kind.paper.startswith("https://arxiv.org/abs/")
        assert kind.title
        assert kind.summary.endswith(".")
        options = {option.name: option for option in options_of(kind)}
        assert {name: option.default for name, option in options.items()} == vars(kind())
        assert all(option.help for option in options.values())


def test_methods_and_their_options_are_known_without_torch() -> None:
    code = """
import sys
from neuromerge_hf.config import config_classes
from neuromerge_hf.options import options_of
assert len([options_of(kind) for kind in config_classes()]) == 9
print(sorted({"torch", "numpy", "transformers", "accelerate", "safetensors"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
