"""What rounding to the dtype of the output leaves of the merged change, against sums that are taken from the files."""

import logging
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cards import card_of
from changes import DOWN, says
from engine_runs import merged_weights
from neuromerge_hf import AverageConfig, IsoCConfig, NeuroMergingConfig, merge, plan_merge
from neuromerge_hf.config import MergeConfig
from neuromerge_hf.engine import measured
from neuromerge_hf.engine.rounding import is_rounded
from neuromerge_hf.folder.report import load_report
from tiny_models import save_adapter, save_llama, seeded

WEIGHTS = "model.safetensors"
CPU = {"device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "base", dtype="bfloat16", hidden_size=64)


@pytest.fixture(scope="module")
def change(base: Path):
    """A function that saves a float32 fine-tune whose change has a given standard deviation."""

    def save(std: float, seed: int = 1) -> Path:
        folder = base.parent / f"changed-{std}-{seed}"
        if not folder.exists():
            with seeded(seed):
                tensors = {
                    name: weight.float() + std * torch.randn(weight.shape)
                    for name, weight in load_file(base / WEIGHTS).items()
                }
            folder.mkdir()
            (folder / "config.json").write_bytes((base / "config.json").read_bytes())
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        return folder

    return save


def from_files(base: Path, exact: Path, rounded: Path, kind: str = "") -> tuple[float, float, float]:
    """The loss, the cosine and the ratio of the norms, of the parameters whose names have `kind` in them."""
    before, merged, written = (load_file(folder / WEIGHTS) for folder in (base, exact, rounded))
    names = [name for name in before if kind in name]

    def flat(tensors: dict[str, Tensor]) -> Tensor:
        return torch.cat([tensors[name].double().flatten() for name in names])

    change, left = flat(merged) - flat(before), flat(written) - flat(before)
    lost = (left - change).square().sum() / change.square().sum()
    return float(lost), float(left @ change / (left.norm() * change.norm())), float(left.norm() / change.norm())


CONFIGS = [NeuroMergingConfig(density=0.5), NeuroMergingConfig(density=1), AverageConfig(), IsoCConfig()]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.method}")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_loss_is_the_one_that_the_files_show(
    base: Path, change, tmp_path: Path, config: MergeConfig, dtype: str
) -> None:
    experts = [change(1e-4, 1), change(3e-4, 2)]
    merge(experts, tmp_path / "exact", base_model=base, config=config, dtype="float32", **CPU)
    found = merge(experts, tmp_path / "rounded", base_model=base, config=config, dtype=dtype, **CPU).rounding
    assert found is not None
    assert found.dtype == dtype
    for kind in [found.model, *found.kinds]:
        name = "" if kind is found.model else kind.kind.rpartition("*.")[2]
        want = from_files(base, tmp_path / "exact", tmp_path / "rounded", name)
        assert (kind.lost, kind.norm_ratio) == pytest.approx((want[0], want[2]), rel=1e-4, abs=2e-6), kind.kind
        assert kind.cosine == (pytest.approx(want[1], rel=1e-4) if want[2] else None), kind.kind
    assert "model.layers.*.mlp.down_proj.weight" in [kind.kind for kind in found.kinds]
    assert load_report(tmp_path / "rounded").rounding == found


def test_adapters_that_are_merged_from_their_factors_are_measured(base: Path, tmp_path: Path) -> None:
    config, adapter = (
        NeuroMergingConfig(density=1, lambda_orthogonal=1e-3),
        save_adapter(base, tmp_path / "lora", seed=1),
    )
    merge([adapter], tmp_path / "exact", base_model=base, config=config, dtype="float32", **CPU)
    found = merge([adapter], tmp_path / "rounded", base_model=base, config=config, **CPU).rounding
    assert found is not None
    want = from_files(base, tmp_path / "exact", tmp_path / "rounded")
    assert (found.model.lost, found.model.cosine, found.model.norm_ratio) == pytest.approx(want, rel=1e-3)


def test_small_changes_are_noisy_and_nearly_as_long_until_most_of_them_is_lost(
    base: Path, change, tmp_path: Path
) -> None:
    losses = []
    for std in (1e-2, 1e-3, 1e-4, 1e-5):
        report = merge([change(std)], tmp_path / str(std), base_model=base, config=AverageConfig(), **CPU)
        assert report.rounding is not None
        losses.append(report.rounding.model)
    assert [found.lost for found in losses] == sorted(found.lost for found in losses)
    assert losses[1].lost < 0.01
    assert 0.05 < losses[2].lost < 0.25
    assert losses[2].norm_ratio == pytest.approx(1, abs=0.1)
    assert losses[3].lost > 0.5


def test_a_loss_above_five_percent_warns_with_what_to_do(
    base: Path, change, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "neuromerge_hf"):
        report = merge([change(1e-4)], tmp_path / "merged", base_model=base, config=AverageConfig(), **CPU)
        (message,) = [record.message for record in caplog.records if record.name.startswith("neuromerge_hf")]
    assert says(message, "Rounding to bfloat16 lost", "cosine", "times as long", "--dtype float32")
    assert message in report.notes
    assert f"Note: {message}" in str(report)
    _, body = card_of(tmp_path / "merged")
    assert "Rounding to bfloat16 lost" in body.partition("## Limits")[2]
    assert "| rounded to bfloat16 | lost | cosine |" in body


def test_a_small_loss_is_said_without_a_warning(
    base: Path, change, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = merge([change(1e-2)], tmp_path / "merged", base_model=base, config=AverageConfig(), **CPU)
    assert not [record for record in caplog.records if record.name.startswith("neuromerge_hf")]
    assert report.notes == []
    assert "Rounding to bfloat16 lost 0.0%" in str(report)
    body = (tmp_path / "merged" / "README.md").read_text()
    assert "| rounded to bfloat16 | lost | cosine |" in body
    assert "| all | 0.0" in body


def test_a_change_that_is_lost_whole_is_said_to_be(base: Path, change, tmp_path: Path) -> None:
    config = AverageConfig(exclude=("*proj*", "*embed*", "lm_head*"))  # norms, which are 1
    found = merge([change(1e-4)], tmp_path / "merged", base_model=base, config=config, **CPU).rounding
    assert found is not None
    assert (found.model.lost, found.model.cosine, found.model.norm_ratio) == (1, None, 0)
    assert "lost all of the merged change" in str(found.warning)


def test_nothing_is_said_of_weights_in_float32(base: Path, change, tmp_path: Path) -> None:
    plan = plan_merge([change(1e-4)], base_model=base, dtype="float32")
    assert plan.rounding is None
    assert "rounded" not in str(plan)
    report = merge([change(1e-4)], tmp_path / "merged", base_model=base, dtype="float32", **CPU)
    assert report.rounding is None
    assert report.notes == []


def test_a_plan_says_what_is_known_before_weights_are_read(base: Path, change) -> None:
    assert says(
        str(plan_merge([change(1e-4)], base_model=base)), "rounded to bfloat16", "0.0039 times", "the report will"
    )
    assert says(
        str(plan_merge([change(1e-4)], base_model=base, dtype="float16")), "rounded to float16", "0.00049 times"
    )


@pytest.mark.parametrize("entries", [1, 200, 5000, sys.maxsize])
def test_the_numbers_depend_neither_on_blocks_nor_on_threads(
    base: Path, change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: int
) -> None:
    monkeypatch.setattr(measured, "LARGE", 2000)
    monkeypatch.setattr(measured, "RUN", 3)
    monkeypatch.setattr(measured, "PERIOD", 8)
    plan = plan_merge([change(1e-4, 1), change(3e-4, 2)], base_model=base)
    want = merged_weights(plan, tmp_path / "want").rounding
    for threads in (1, 3):
        assert merged_weights(plan, tmp_path / f"{threads}", threads=threads, block_entries=entries).rounding == want
    assert want is not None


def test_every_large_tensor_is_measured_in_part(
    base: Path, change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_merge([change(1e-4)], base_model=base)
    whole = merged_weights(plan, tmp_path / "whole").rounding
    monkeypatch.setattr(measured, "LARGE", 2000)
    monkeypatch.setattr(measured, "RUN", 2)
    monkeypatch.setattr(measured, "PERIOD", 4)
    part = merged_weights(plan, tmp_path / "part").rounding
    assert whole is not None
    assert part is not None
    assert part != whole
    assert part.model.lost == pytest.approx(whole.model.lost, rel=0.5)
    assert [kind.kind for kind in part.kinds] == [kind.kind for kind in whole.kinds]


def test_units_that_are_copied_are_not_measured(base: Path, change) -> None:
    plan = plan_merge([change(1e-4)], base_model=base, config=NeuroMergingConfig(exclude=(DOWN,)))
    assert [unit.parameter for unit in plan.units if not is_rounded(unit)] == [DOWN]
