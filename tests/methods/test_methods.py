"""The methods that NeuroMerging is compared with: against their definitions written out directly, on whole models."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import reference
import reference_methods
from engine_runs import merged_weights
from families import Relatives
from neuromerge_hf import (
    AutoMergedModel,
    AverageConfig,
    DARETIESConfig,
    IsoCConfig,
    MergeError,
    NeuroIsoConfig,
    NeuroMergingConfig,
    PCBConfig,
    TaskArithmeticConfig,
    TIESConfig,
    TSVConfig,
    merge,
    merge_recipe,
    plan_merge,
)
from neuromerge_hf.cli import app
from neuromerge_hf.config import MergeConfig, config_class
from neuromerge_hf.methods.dare import dropped
from tiny_models import contents, save_adapter, save_fine_tune, save_llama

CPU = {"device": "cpu", "threads": 1}

CONFIGURATIONS = {
    "average": AverageConfig(),
    "average 1 2 5": AverageConfig(weights=(1, 2, 5)),
    "task arithmetic": TaskArithmeticConfig(),
    "task arithmetic 0.7": TaskArithmeticConfig(scale=0.7),
    "task arithmetic, weights": TaskArithmeticConfig(weights=(1, 0.5, 3)),
    "ties, weights": TIESConfig(density=0.5, weights=(1, 0.5, 3)),
    "dare, weights": DARETIESConfig(drop_rate=0.5, density=1, weights=(1, 0.5, 3)),
    "ties": TIESConfig(),
    "ties 0.5": TIESConfig(density=0.5, scale=1.3),
    "ties 1": TIESConfig(density=1),
    "dare": DARETIESConfig(),
    "dare 0.9": DARETIESConfig(drop_rate=0.9, density=1, scale=0.5, seed=3),
    "pcb": PCBConfig(),
    "pcb 0.3": PCBConfig(density=0.3, scale=1.2),
}

BY_MATRIX = {
    "iso": IsoCConfig(),
    "iso 1.5": IsoCConfig(scale=1.5),
    "tsv": TSVConfig(),
    "tsv 0.6": TSVConfig(scale=0.6),
    "neuro iso": NeuroIsoConfig(),
    "neuro iso 0.7": NeuroIsoConfig(scale=0.7, density=0.5),
}

ONE_OF_EACH = {
    **{name: CONFIGURATIONS[name] for name in ("average", "task arithmetic", "ties", "dare", "pcb")},
    **{name: BY_MATRIX[name] for name in ("iso", "tsv", "neuro iso")},
}

ALONE = [
    AverageConfig(),
    TaskArithmeticConfig(scale=1),
    TIESConfig(density=1),
    DARETIESConfig(drop_rate=0, density=1),
    TSVConfig(),
]


@pytest.fixture(scope="module")
def relatives_of(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Relatives] = {}

    def relatives_of(name: str) -> Relatives:
        return made.setdefault(name, Relatives(name, tmp_path_factory.mktemp(name)))

    return relatives_of


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base with rows of 39 and 51 entries, two fine-tunes and an adapter of it."""
    folder = tmp_path_factory.mktemp("odd")
    base = save_llama(
        folder / "base", hidden_size=39, num_attention_heads=3, num_key_value_heads=1, head_dim=6, intermediate_size=51
    )
    fine_tunes = [save_fine_tune(base, folder / f"full-{seed}", seed=seed) for seed in (1, 2)]
    return [base, *fine_tunes, save_adapter(base, folder / "lora", seed=3, r=5)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# The definitions


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("gpt2", ("full",) * 3), ("bert", ("lora",) * 3), ("bert", ("full", "lora", "full"))],
    ids=["gpt2 full", "bert lora", "bert both"],
)
@pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_three_experts_are_merged_as_defined(config: MergeConfig, name: str, kinds, relatives_of, tmp_path) -> None:
    relatives = relatives_of(name)
    experts = [relatives.expert(kind, number) for number, kind in enumerate(kinds)]
    merge(experts, tmp_path / "merged", base_model=relatives.base, config=config, **CPU)
    got, base = relatives.base_state(tmp_path / "merged"), relatives.base_state()
    flat = reference_methods.Flat(base, relatives.experts_state(experts))
    settings = {key: value for key, value in config.to_dict().items() if key != "exclude"}
    if config.method == "dare_ties":
        settings["neurons"] = relatives.family.neurons_of(base)
    want = flat.merged(reference_methods.METHODS[config.method](flat, **settings))

    change = torch.cat([(want[key] - flat.base[key].double()).flatten() for key in want])
    error = torch.cat([(got[key].double() - want[key]).flatten() for key in want]).abs()
    magnitude = torch.cat([want[key].flatten() for key in want]).abs()
    agreeing = error <= 1e-5 * change.abs() + 1e-6 * magnitude.clamp(min=0.1)
    # What an adapter adds is rounded here and not there: single entries are on the other side of a threshold or of 0.
    assert agreeing.float().mean() >= (0.998 if "lora" in kinds else 0.9999)
    assert error.norm() <= (0.05 if "lora" in kinds else 1e-3) * change.norm()


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("gpt2", ("full",) * 3),
        ("bert", ("lora",) * 3),
        ("bert", ("full", "lora", "full")),
        ("mixtral", ("full",) * 2),
        ("gpt-oss", ("full",) * 2),
    ],
    ids=["gpt2 full", "bert lora", "bert both", "mixtral full", "gpt-oss full"],
)
@pytest.mark.parametrize("config", BY_MATRIX.values(), ids=BY_MATRIX)
def test_matrices_of_linear_layers_are_merged_whole(config: MergeConfig, name: str, kinds, relatives_of, tmp_path):
    relatives = relatives_of(name)
    experts = [relatives.expert(kind, number) for number, kind in enumerate(kinds)]
    report = merge(experts, tmp_path / "merged", base_model=relatives.base, config=config, **CPU)
    got, base = relatives.base_state(tmp_path / "merged"), relatives.base_state()
    flat = reference_methods.Flat(base, relatives.experts_state(experts))
    matrices = relatives.family.matrices_of(base)
    settings = {key: value for key, value in config.to_dict().items() if key != "exclude"}
    if config.method == "neuro_iso":
        others = relatives.family.neurons_of(base), settings.pop("density"), settings.pop("lambda_parallel")
        del settings["lambda_orthogonal"]
        settings["others"], _ = reference.merge_model(base, relatives.experts_state(experts), *others)
    want = flat.merged(reference_methods.METHODS[config.method](flat, matrices=matrices, **settings))
    for key in want:
        change = (want[key] - flat.base[key].double()).norm()
        # What an adapter adds is rounded here and not there, so some entries are on the other side of a threshold.
        tolerance = 0.05 if "lora" in kinds and key not in matrices else 1e-3
        assert (got[key].double() - want[key]).norm() <= tolerance * change + 1e-6 * want[key].norm(), key
    changed = {key for key in matrices if (want[key] != flat.base[key]).any()}
    assert report.by_matrix.entries == sum(base[key].numel() for key in changed)


@pytest.mark.parametrize("config", ALONE, ids=lambda config: config.method)
def test_one_expert_alone_is_given_back(config: MergeConfig, models: list[Path], tmp_path: Path) -> None:
    merge([models[1]], tmp_path / "merged", base_model=models[0], config=config, **CPU)
    for name, expert in weights(models[1]).items():
        torch.testing.assert_close(weights(tmp_path / "merged")[name], expert, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("number", [1, 3], ids=["full", "lora"])
def test_equal_experts_are_given_back_by_neuro_iso(count: int, number: int, models: list[Path], tmp_path: Path) -> None:
    config = NeuroIsoConfig(density=1, lambda_parallel=1, lambda_orthogonal=1)
    merge([models[number]] * count, tmp_path / "merged", base_model=models[0], config=config, **CPU)
    merge([models[number]], tmp_path / "expert", base_model=models[0], config=TaskArithmeticConfig(scale=1), **CPU)
    got, want, base = (weights(folder) for folder in (tmp_path / "merged", tmp_path / "expert", models[0]))
    for name, tensor in want.items():
        assert (got[name] - tensor).norm() <= 1e-3 * (tensor - base[name]).norm() + 1e-6 * tensor.norm(), name


@pytest.mark.parametrize("config", ONE_OF_EACH.values(), ids=ONE_OF_EACH)
def test_experts_that_change_nothing_leave_the_base_bit_for_bit(
    config: MergeConfig, models: list[Path], tmp_path: Path
) -> None:
    merge([models[0], models[0]], tmp_path / "merged", base_model=models[0], config=config, **CPU)
    merged, base = tmp_path / "merged" / "model.safetensors", models[0] / "model.safetensors"
    assert merged.read_bytes() == base.read_bytes()


def test_where_ties_elects_no_sign_the_base_stays(models: list[Path], tmp_path: Path) -> None:
    base = {name: torch.zeros_like(tensor) for name, tensor in weights(models[0]).items()}
    for folder, sign in (("origin", 0), ("plus", 1), ("minus", -1)):
        (tmp_path / folder).mkdir()
        for file in models[0].glob("*.json"):
            (tmp_path / folder / file.name).write_bytes(file.read_bytes())
        changed = {name: tensor + sign * 0.25 for name, tensor in base.items()}
        save_file(changed, tmp_path / folder / "model.safetensors", {"format": "pt"})
    experts = [tmp_path / "plus", tmp_path / "minus"]
    merge(experts, tmp_path / "merged", base_model=tmp_path / "origin", config=TIESConfig(density=1), **CPU)
    assert not any(tensor.any() for tensor in weights(tmp_path / "merged").values())


def test_an_average_counts_every_expert_for_every_parameter(models: list[Path], tmp_path: Path) -> None:
    base, full, _, lora = models
    merge([full, lora], tmp_path / "merged", base_model=base, config=AverageConfig(), **CPU)
    name = "model.norm.weight"  # which the adapter leaves alone
    got = weights(tmp_path / "merged")[name]
    torch.testing.assert_close(got, (weights(full)[name] + weights(base)[name]) / 2)


# DARE's random numbers


@pytest.mark.parametrize("drop_rate", [0.0, 0.1, 0.5, 0.99])
def test_the_share_that_is_dropped_is_the_drop_rate(drop_rate: float) -> None:
    share = dropped(0, 0, "weight", 0, 200_000, drop_rate).float().mean().item()
    assert share == pytest.approx(drop_rate, abs=5 * (drop_rate * (1 - drop_rate) / 200_000) ** 0.5)


@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 1), (3, 7), (4, 4), (501, 499), (999, 1)])
def test_what_is_dropped_does_not_depend_on_the_block(first: int, count: int) -> None:
    whole = dropped(1, 2, "layer.weight", 0, 1000, 0.5)
    assert torch.equal(dropped(1, 2, "layer.weight", first, count, 0.5), whole[first : first + count])


def test_seeds_experts_and_parameters_have_numbers_of_their_own() -> None:
    drawn = [dropped(*key, 0, 10_000, 0.5) for key in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"))]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert (one == other).float().mean().item() == pytest.approx(0.5, abs=0.025)


# One engine


@pytest.mark.parametrize("config", ONE_OF_EACH.values(), ids=ONE_OF_EACH)
def test_threads_and_blocks_change_no_byte(config: MergeConfig, models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    plan = plan_merge(experts, base_model=base, config=config)
    want = merged_weights(plan, tmp_path / "want", threads=1, block_entries=sys.maxsize)
    got = merged_weights(plan, tmp_path / "got", threads=3, block_entries=150)
    assert got.files == want.files


@pytest.mark.parametrize("config", ONE_OF_EACH.values(), ids=ONE_OF_EACH)
def test_the_recipe_reproduces_every_byte(config: MergeConfig, models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    merge(experts, tmp_path / "first", base_model=base, config=config, device="cpu")
    content = yaml.safe_load((tmp_path / "first" / "recipe.yaml").read_text())
    assert config_class(content["method"])(**content["config"]) == config
    merge_recipe(tmp_path / "first" / "recipe.yaml", tmp_path / "second", device="cpu")
    assert contents(tmp_path / "second") == contents(tmp_path / "first")


def test_a_recipe_without_a_method_is_neuromerging(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    merge(experts, tmp_path / "first", base_model=base, **CPU)
    recipe = tmp_path / "first" / "recipe.yaml"
    before = contents(tmp_path / "first")
    recipe.write_text(recipe.read_text().replace("method: neuromerging\n", ""))
    merge_recipe(recipe, tmp_path / "second", **CPU)
    assert contents(tmp_path / "second") == before


def test_a_recipe_of_an_unknown_method_is_refused(models: list[Path], tmp_path: Path) -> None:
    merge([models[3]], tmp_path / "merged", base_model=models[0], config=TIESConfig(), **CPU)
    recipe = tmp_path / "merged" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("method: ties", "method: slerp"))
    with pytest.raises(MergeError, match=r"method must be one of neuromerging, average, .*, not 'slerp'"):
        merge_recipe(recipe, tmp_path / "again")


@pytest.mark.parametrize("config", [*ONE_OF_EACH.values(), TIESConfig(density=1)], ids=[*ONE_OF_EACH, "ties 1"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(
    value: float, config: MergeConfig, models: list[Path], tmp_path: Path
) -> None:
    base, _, math, code = models
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    tensors = weights(math)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    (damaged / "config.json").write_bytes((math / "config.json").read_bytes())
    with pytest.raises(MergeError, match=r"model\.layers\.1\.mlp\.down_proj\.weight of damaged holds a NaN"):
        merge([damaged, code], tmp_path / "merged", base_model=base, config=config, **CPU)


def test_excluded_parameters_are_the_bases(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    config = TIESConfig(exclude=("*norm*",))
    merge(experts, tmp_path / "merged", base_model=base, config=config, **CPU)
    merged, before = weights(tmp_path / "merged"), weights(base)
    assert {name for name in before if torch.equal(merged[name], before[name])} == {n for n in before if "norm" in n}


def test_auto_merged_model_takes_any_method(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    for config in (TIESConfig(), TIESConfig(density=0.3), AverageConfig()):
        model = AutoMergedModel.from_pretrained(
            experts, base_model=base, config=config, merge_cache_dir=tmp_path / "cache"
        )
        merge(experts, tmp_path / repr(config), base_model=base, config=config)
        for name, tensor in weights(tmp_path / repr(config)).items():
            assert torch.equal(model.get_parameter(name), tensor)


# What is said


def test_the_report_says_which_method_and_its_settings(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    report = merge(experts, tmp_path / "ties", base_model=base, config=TIESConfig(scale=0.7), **CPU)
    assert (report.method, report.settings) == (
        "ties",
        {"weights": None, "density": 0.2, "scale": 0.7, "exclude": []},
    )
    assert (report.density, report.sigma, report.lambda_parallel, report.lambda_orthogonal) == (0.2, None, None, None)
    assert "method ties, density 0.2, scale 0.7" in str(report)
    assert "sigma" not in str(report)
    report = merge(experts, tmp_path / "iso", base_model=base, config=NeuroIsoConfig(scale=0.3), **CPU)
    assert "method neuro_iso, density 0.2, " in str(report)
    assert ", scale 0.3" in str(report)
    report = merge(experts, tmp_path / "neuro", base_model=base, config=NeuroMergingConfig(), **CPU)
    assert report.method == "neuromerging"
    assert report.settings["lambda_orthogonal"] == report.lambda_orthogonal


@pytest.mark.parametrize(("config", "passes"), [(AverageConfig(), 1), (TIESConfig(), 2), (PCBConfig(), 4)])
def test_the_plan_counts_the_passes(config: MergeConfig, passes: int, models: list[Path]) -> None:
    base, *experts = models
    plan = plan_merge(experts, base_model=base, config=config)
    assert plan.bytes_read == passes * sum(unit.bytes_read for unit in plan.units)


def test_neuro_iso_of_adapters_alone_reads_the_inputs_once(relatives_of, tmp_path: Path) -> None:
    relatives = relatives_of("llama")
    experts = [relatives.adapter(0), relatives.adapter(1)]
    plan = plan_merge(experts, base_model=relatives.base, config=NeuroIsoConfig())
    read: list[int] = []
    merged_weights(plan, tmp_path / "merged", advance=read.append)
    assert sum(read) == plan.bytes_read == sum(unit.bytes_read for unit in plan.units)
    mixed = plan_merge([relatives.full(0), *experts], base_model=relatives.base, config=NeuroIsoConfig())
    assert mixed.bytes_read > sum(unit.bytes_read for unit in mixed.units)


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ("--method average", AverageConfig()),
        ("--method average --weights 0.2,0.3,0.5", AverageConfig(weights=(0.2, 0.3, 0.5))),
        ("--method task_arithmetic --scale 0.3", TaskArithmeticConfig(scale=0.3)),
        ("--method ties --density 0.5 --scale 0.9", TIESConfig(density=0.5, scale=0.9)),
        ("--method dare_ties --drop-rate 0.5 --seed 7", DARETIESConfig(drop_rate=0.5, seed=7)),
        ("--method pcb --exclude *norm*", PCBConfig(exclude=("*norm*",))),
        ("--method iso_c --scale 1.3", IsoCConfig(scale=1.3)),
        ("--method tsv --scale 0.8", TSVConfig(scale=0.8)),
        ("--method neuro_iso", NeuroIsoConfig()),
        ("--method neuro_iso --scale 1.2 --density 0.5", NeuroIsoConfig(scale=1.2, density=0.5)),
        ("--method neuromerging --density 0.5", NeuroMergingConfig(density=0.5)),
    ],
)
def test_the_command_line_chooses_the_method(options: str, config: MergeConfig, models, tmp_path) -> None:
    arguments = ["merge", *map(str, models[1:]), "--base-model", str(models[0]), "--output", str(tmp_path / "merged")]
    done = CliRunner().invoke(app, [*arguments, *options.split()])
    assert done.exit_code == 0, done.output
    content = yaml.safe_load((tmp_path / "merged" / "recipe.yaml").read_text())
    assert (content["method"], content["config"]) == (config.method, config.to_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method average --density 0.5", "--method average has no --density"),
        ("--method ties --lambda-orthogonal 2", "--method ties has no --lambda-orthogonal"),
        ("--scale 2 --seed 1", "--method neuro_iso has no --seed"),
        ("--method dare_ties --drop-rate 1", "drop_rate must be a number with 0 <= drop_rate < 1"),
        ("--method pcb --density 0", "density must be a number with 0 < density <= 1"),
    ],
)
def test_options_of_other_methods_are_refused(options: str, message: str, models: list[Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["merge", str(models[3]), "--output", str(tmp_path / "merged"), *options.split()])
    assert done.exit_code == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    ("method", "setting", "value"),
    [
        (TaskArithmeticConfig, "scale", float("nan")),
        (TIESConfig, "density", 0),
        (TIESConfig, "scale", "large"),
        (DARETIESConfig, "drop_rate", 1),
        (DARETIESConfig, "drop_rate", -0.1),
        (DARETIESConfig, "seed", 1.5),
        (DARETIESConfig, "seed", -1),
        (PCBConfig, "density", 1.1),
        (PCBConfig, "scale", None),
        (IsoCConfig, "scale", float("inf")),
        (TSVConfig, "scale", "auto"),
        (AverageConfig, "exclude", "lm_head"),
        (AverageConfig, "weights", (1, 0)),
        (AverageConfig, "weights", ()),
        (AverageConfig, "weights", 0.5),
    ],
)
def test_a_setting_out_of_range_is_refused(method: type[MergeConfig], setting: str, value: object) -> None:
    with pytest.raises(MergeError, match=rf"^{setting} must be .*not {re.escape(repr(value))}"):
        method(**{setting: value})
