"""Trim thresholds against `torch.kthvalue` of the whole concatenated task vector, bit for bit, and sigma against sums.

The experts are real checkpoints and adapters, the task vectors what one gets by subtracting the files' tensors.
"""

import math
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from neuromerge_hf import MergeError, NeuroMergingConfig, merge, plan_merge
from neuromerge_hf.engine.passes import Passes
from neuromerge_hf.engine.thresholds import find_trimmings
from neuromerge_hf.engine.trimming import Trimming, trim_rank
from tiny_models import save_adapter, save_fine_tune, save_llama

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"

Change = Callable[[str, Tensor], Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("trim") / "base", hidden_size=20, head_dim=6, intermediate_size=25)


@pytest.fixture(scope="module")
def expert(base: Path) -> Path:
    return save_fine_tune(base, base.parent / "expert", seed=1)


def with_task_vector(base: Path, folder: Path, change: Change) -> Path:
    """A fine-tune whose float32 task vector is what `change` makes of each of the base's tensors, given from zeros."""
    shutil.copytree(base, folder)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(base / WEIGHTS).items()}
    save_file({name: change(name, tensor) for name, tensor in zeros.items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


def zero_base(base: Path, folder: Path) -> Path:
    """The base with all weights 0, so that an expert's weights are its task vector."""
    return with_task_vector(base, folder, lambda _, zeros: zeros)


def task_vector(base: Path, expert: Path, names: set[str] | None = None) -> Tensor:
    """The concatenated task vector of the tensors that two checkpoints share, or of those of `names`."""
    ours, theirs = load_file(base / WEIGHTS), load_file(expert / WEIGHTS)
    return torch.cat([(theirs[k].float() - ours[k].float()).flatten() for k in ours if names is None or k in names])


def assert_exact(trimming: Trimming, tau: Tensor, density: float) -> None:
    j = math.floor((1 - Fraction(str(density))) * tau.numel())
    magnitudes = tau.abs()
    threshold = magnitudes.kthvalue(j).values.item() if j else 0.0
    removed = magnitudes[magnitudes < threshold].double().sum() / magnitudes.double().sum() if threshold else 0.0
    assert trimming.threshold == threshold
    assert trimming.entries == tau.numel()
    assert trimming.trimmed == (magnitudes < threshold).sum()
    assert trimming.sigma == pytest.approx(float(removed), rel=1e-6, abs=1e-12)


def find(
    base: Path, *experts: Path, density: float = 0.2, exclude: tuple[str, ...] = (), **options: int
) -> list[Trimming]:
    """The trimmings of experts; `options` go to `find_trimmings`."""
    config = NeuroMergingConfig(density=density, exclude=exclude)
    plan = plan_merge(experts, base_model=base, config=config)
    return find_trimmings(Passes(plan.work, CPU), density, **options)


# Exactness


@pytest.mark.parametrize("density", [0.9999, 0.9, 0.5, 0.2, 0.1, 0.01, 1e-4])
def test_thresholds_are_exact_at_any_density(density: float, base: Path, expert: Path) -> None:
    (trimming,) = find(base, expert, density=density)
    assert_exact(trimming, task_vector(base, expert), density)


def test_the_least_density_leaves_the_largest_entry(base: Path, expert: Path) -> None:
    tau = task_vector(base, expert)
    (trimming,) = find(base, expert, density=1e-9)
    # j = floor((1 - r) n) is n - 1, so the second largest entry is the threshold.
    assert trimming.threshold == tau.abs().topk(2).values[1].item()
    assert_exact(trimming, tau, 1e-9)


@pytest.mark.parametrize(("entries", "density", "rank"), [(10, 0.9, 1), (10, 0.7, 3), (1000, 0.29, 710), (7, 0.2, 5)])
def test_ranks_are_those_of_the_decimal_number_that_was_written(entries: int, density: float, rank: int) -> None:
    # In binary (1 - 0.9) * 10 is a little less than 1.
    assert trim_rank(entries, density) == rank


@pytest.mark.parametrize(("density", "rank"), [(0.9, 1), (0.7, 3), (0.2, 8), (0.1, 9)])
def test_a_task_vector_of_ten_entries_loses_exactly_its_share(density: float, rank: int, base: Path, tmp_path: Path):
    small = save_llama(tmp_path / "base", hidden_size=10, num_attention_heads=1, num_key_value_heads=1)
    origin = zero_base(small, tmp_path / "origin")
    entries = torch.tensor([3.0, -1.0, 4.0, -10.0, 5.0, 9.0, -2.0, 6.0, -8.0, 7.0])
    tuned = with_task_vector(
        origin, tmp_path / "tuned", lambda name, x: x + entries if name == "model.norm.weight" else x
    )
    everything_else = tuple(name for name in load_file(origin / WEIGHTS) if name != "model.norm.weight")
    (trimming,) = find(origin, tuned, density=density, exclude=everything_else)
    assert trimming == Trimming(float(rank), pytest.approx(rank * (rank - 1) / 2 / 55), 10, rank - 1)


@pytest.mark.parametrize("bins", [4, 16, 1 << 10])
@pytest.mark.parametrize("sample", [1, 50, 1 << 22])
def test_a_wrong_prediction_costs_passes_but_no_exactness(bins: int, sample: int, base: Path, expert: Path) -> None:
    plan = plan_merge([expert], base_model=base)
    read: list[int] = []
    passes = Passes(plan.work, CPU, advance=read.append)
    (trimming,) = find_trimmings(passes, 0.2, bins=bins, sample_entries=sample)
    assert_exact(trimming, task_vector(base, expert), 0.2)
    passes = sum(read) / sum(unit.bytes_read for unit in plan.units)
    assert passes <= 32
    if sample == 1:
        assert passes >= 2


def test_threshold_and_sigma_do_not_depend_on_the_blocks(base: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def change(name: str, zeros: Tensor) -> Tensor:  # neurons so different that the order of a float64 sum counts
        neurons = (len(zeros), *[1] * (zeros.ndim - 1))
        return torch.rand(zeros.shape, generator=generator) * 10 ** (torch.rand(neurons, generator=generator) * 12)

    expert = with_task_vector(base, tmp_path / "expert", change)
    work = plan_merge([expert], base_model=zero_base(base, tmp_path / "zero")).work
    found = [
        find_trimmings(Passes(work, CPU, threads=threads, block_entries=entries), 0.2)
        for threads, entries in ((1, 1 << 20), (3, 20), (2, 77), (3, 150), (1, 1000))
    ]
    assert all(each == found[0] for each in found)


def test_a_good_prediction_needs_one_pass(base: Path, expert: Path) -> None:
    plan = plan_merge([expert, expert], base_model=base)
    read: list[int] = []
    find_trimmings(Passes(plan.work, CPU, advance=read.append), 0.2)
    assert sum(read) == sum(unit.bytes_read for unit in plan.units)


def test_no_sample_predicts_a_threshold_far_from_the_rest(base: Path, tmp_path: Path) -> None:
    origin = zero_base(base, tmp_path / "origin")

    def change(name: str, x: Tensor) -> Tensor:
        spread = torch.arange(1.0, x.numel() + 1).view_as(x)
        return spread * (1e30 if "mlp" in name else 1e-30)

    tuned = with_task_vector(origin, tmp_path / "tuned", change)
    for density in (0.9, 0.5, 0.2):
        (trimming,) = find(origin, tuned, density=density, sample_entries=10)
        assert_exact(trimming, task_vector(origin, tuned), density)


def test_experts_are_settled_independently(base: Path, expert: Path, tmp_path: Path) -> None:
    origin = zero_base(base, tmp_path / "origin")
    generator = torch.Generator().manual_seed(0)
    tuned = [
        with_task_vector(
            origin, tmp_path / str(scale), lambda _, x, s=scale: s * torch.randn(x.shape, generator=generator)
        )
        for scale in (1e-20, 1.0, 1e20)
    ]
    trimmings = find(origin, *tuned, origin, expert, bins=64)
    for trimming, folder in zip(trimmings, [*tuned, origin, expert], strict=True):
        tau = task_vector(origin, folder)
        if folder == origin:
            assert trimming == Trimming(0.0, 0.0, tau.numel())
        else:
            assert_exact(trimming, tau, 0.2)


# Special task vectors


@pytest.mark.parametrize("bins", [16, 1 << 16])
def test_entries_equal_to_the_threshold_stay(bins: int, base: Path, tmp_path: Path) -> None:
    origin = zero_base(base, tmp_path / "origin")

    def change(_: str, x: Tensor) -> Tensor:
        # -2, -1, 0, 1, 2 in turn: at every density the threshold is shared by a large part of the entries.
        return (torch.arange(x.numel()) % 5 - 2.0).view_as(x)

    tuned = with_task_vector(origin, tmp_path / "tuned", change)
    tau = task_vector(origin, tuned)
    for density, threshold in ((0.9, 0.0), (0.7, 1.0), (0.5, 1.0), (0.3, 2.0), (0.01, 2.0)):
        (trimming,) = find(origin, tuned, density=density, bins=bins)
        assert trimming.threshold == threshold
        assert_exact(trimming, tau, density)
    config = NeuroMergingConfig(density=0.5, lambda_orthogonal=1)
    merge([tuned], tmp_path / "merged", base_model=origin, config=config, device="cpu", threads=1)
    assert torch.equal(task_vector(origin, tmp_path / "merged"), torch.where(tau.abs() >= 1, tau, 0.0))


def test_an_expert_that_changes_nothing_has_threshold_and_sigma_zero(base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "copy")
    (trimming,) = find(base, copy)
    assert trimming == Trimming(0.0, 0.0, task_vector(base, copy).numel())
    merge([copy], tmp_path / "merged", base_model=base, device="cpu", threads=1)
    assert (tmp_path / "merged" / WEIGHTS).read_bytes() == (base / WEIGHTS).read_bytes()


def test_density_one_keeps_everything_and_reads_nothing(base: Path, expert: Path) -> None:
    read: list[int] = []
    plan = plan_merge([expert], base_model=base, config=NeuroMergingConfig(density=1))
    passes = Passes(plan.work, CPU, advance=read.append)
    assert find_trimmings(passes, 1) == [Trimming(0.0, 0.0, task_vector(base, expert).numel())]
    assert not read


def test_denormal_entries_are_told_apart(base: Path, tmp_path: Path) -> None:
    origin = zero_base(base, tmp_path / "origin")

    def change(_: str, x: Tensor) -> Tensor:
        return torch.arange(1, x.numel() + 1, dtype=torch.int32).view(torch.float32).view_as(x)

    tuned = with_task_vector(origin, tmp_path / "tuned", change)
    (trimming,) = find(origin, tuned)
    assert_exact(trimming, task_vector(origin, tuned), 0.2)
    assert 0 < trimming.threshold < torch.finfo(torch.float32).tiny


# Which entries count


def test_each_expert_is_trimmed_over_the_parameters_that_it_may_change(base: Path, expert: Path) -> None:
    wide = save_adapter(base, base.parent / "wide", seed=2, target_modules=["q_proj", "up_proj"])
    narrow = save_adapter(base, base.parent / "narrow", seed=3, r=1, target_modules=["v_proj"])
    trimmings = find(base, wide, expert, narrow, density=0.3)
    assert_exact(trimmings[1], task_vector(base, expert), 0.3)
    weights = load_file(base / WEIGHTS)
    for trimming, adapter, scaling in ((trimmings[0], wide, 2.0), (trimmings[2], narrow, 8.0)):
        factors = load_file(adapter / "adapter_model.safetensors")
        products = [
            scaling * factors[key.replace("lora_A", "lora_B")] @ a for key, a in factors.items() if "lora_A" in key
        ]
        tau = torch.cat([product.flatten() for product in products])
        assert trimming.entries == tau.numel() < sum(tensor.numel() for tensor in weights.values())
        j = math.floor(Fraction("0.7") * tau.numel())
        assert trimming.threshold == pytest.approx(tau.abs().kthvalue(j).values.item(), rel=1e-6)


def test_excluded_parameters_do_not_count(base: Path, expert: Path) -> None:
    names = {name for name in load_file(base / WEIGHTS) if "mlp" not in name}
    (trimming,) = find(base, expert, exclude=("*.mlp.*",))
    assert_exact(trimming, task_vector(base, expert, names), 0.2)


# Damaged weights


@pytest.mark.parametrize("density", [1.0, 0.2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("damaged", ["expert", "base"])
def test_a_value_that_is_not_finite_is_found_and_named(
    damaged: str, name: str, value: float, density: float, base: Path, expert: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree({"base": base, "expert": expert}[damaged], tmp_path / damaged)
    tensors = load_file(copy / WEIGHTS)
    tensors[name].view(-1)[7] = value
    save_file(tensors, copy / WEIGHTS, {"format": "pt"})
    folders = {"base": base, "expert": expert} | {damaged: copy}
    config = NeuroMergingConfig(density=density)
    with pytest.raises(MergeError) as caught:
        merge([folders["expert"]], tmp_path / "out", base_model=folders["base"], config=config, device="cpu", threads=1)
    message = str(caught.value)
    assert message.startswith(
        f"{name} of {'the base model' if damaged == 'base' else 'expert'} holds a NaN or an infinity"
    )
    assert str(copy / WEIGHTS) in message
    assert not (tmp_path / "out").exists()
