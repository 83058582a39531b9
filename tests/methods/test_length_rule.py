"""lambda_2 by length: the merged task vector is as long as the rule says, and all else is as with any lambda_2."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from engine_runs import merged_weights
from neuromerge_hf import MergeError, NeuroMergingConfig, merge, merge_recipe, plan_merge
from neuromerge_hf.cli import app
from tiny_models import contents, save_adapter, save_fine_tune, save_llama

CPU = {"device": "cpu", "threads": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base with rows of 39 and 51 entries, two fine-tunes and two adapters of it."""
    folder = tmp_path_factory.mktemp("odd")
    base = save_llama(
        folder / "base", hidden_size=39, num_attention_heads=3, num_key_value_heads=1, head_dim=6, intermediate_size=51
    )
    full = {f"full {seed}": save_fine_tune(base, folder / f"full-{seed}", seed=seed) for seed in (1, 2)}
    lora = {f"lora {seed}": save_adapter(base, folder / f"lora-{seed}", seed=seed, r=5) for seed in (3, 4)}
    return {"base": base, **full, **lora}


def flat(folder: Path) -> Tensor:
    return torch.cat(
        [tensor.double().flatten() for _, tensor in sorted(load_file(folder / "model.safetensors").items())]
    )


def task_vector(expert: Path, base: Path, folder: Path) -> Tensor:
    """What merging an expert alone adds to the base."""
    merge([expert], folder, base_model=base, config=NeuroMergingConfig(1.0, 1.0, 1.0), **CPU)
    return flat(folder) - flat(base)


@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("names", [("full 1", "full 2"), ("lora 3", "lora 4"), ("full 1", "lora 3", "lora 4")], ids=str)
def test_the_merged_task_vector_has_the_length_of_the_rule(names, density: float, models, tmp_path: Path) -> None:
    experts, base = [models[name] for name in names], models["base"]
    vectors = torch.stack(
        [task_vector(expert, base, tmp_path / f"alone-{number}") for number, expert in enumerate(experts)]
    )
    by_length = NeuroMergingConfig(density, lambda_orthogonal="length")
    report = merge(experts, tmp_path / "merged", base_model=base, config=by_length, **CPU)
    assert report.lambda_orthogonal is not None
    merge(experts, tmp_path / "at one", base_model=base, config=NeuroMergingConfig(density, 1.0, 1.0), **CPU)
    at_one = (flat(tmp_path / "at one") - flat(base)).norm().item()
    thresholds = torch.tensor([[expert.threshold] for expert in report.experts], dtype=torch.float64)
    # Alone, an expert is rounded to the size of the base's weights: entries at the threshold fall on either side.
    trimmed = torch.where(vectors.abs() >= thresholds * (1 - 1e-5), vectors, 0.0)
    cosines = [torch.cosine_similarity(s, t, dim=0).item() for s, t in itertools.combinations(trimmed, 2)]
    want = math.sqrt(2 - max(0, sum(cosines) / len(cosines))) * vectors.norm(dim=1).mean().item()
    assert report.lambda_orthogonal * at_one == pytest.approx(want, rel=1e-3)
    as_a_number = NeuroMergingConfig(density, lambda_orthogonal=report.lambda_orthogonal)
    merge(experts, tmp_path / "number", base_model=base, config=as_a_number, **CPU)
    assert torch.equal(flat(tmp_path / "merged"), flat(tmp_path / "number"))


def test_one_expert_alone_and_several_that_are_the_same_come_back(models, tmp_path: Path) -> None:
    config = NeuroMergingConfig(1.0, 1.0, "length")
    for number, times in enumerate((1, 3)):
        experts = [models["full 1"]] * times
        report = merge(experts, tmp_path / str(number), base_model=models["base"], config=config, **CPU)
        assert report.lambda_orthogonal == pytest.approx(1, abs=1e-4)
        torch.testing.assert_close(flat(tmp_path / str(number)), flat(models["full 1"]), rtol=1e-4, atol=1e-6)


def test_an_expert_that_changes_nothing_does_not_shorten_the_merge(models, tmp_path: Path) -> None:
    config = NeuroMergingConfig(1.0, lambda_orthogonal="length")
    experts = [models["full 1"], models["full 2"]]
    without = merge(experts, tmp_path / "without", base_model=models["base"], config=config, **CPU)
    merge([*experts, models["base"]], tmp_path / "with", base_model=models["base"], config=config, **CPU)
    assert (flat(tmp_path / "with") - flat(models["base"])).norm().item() == pytest.approx(
        (flat(tmp_path / "without") - flat(models["base"])).norm().item(), rel=1e-4
    )
    assert without.lambda_orthogonal is not None
    nothing = merge([models["base"]] * 2, tmp_path / "nothing", base_model=models["base"], config=config, **CPU)
    assert nothing.lambda_orthogonal == 1
    assert torch.equal(flat(tmp_path / "nothing"), flat(models["base"]))


@pytest.mark.parametrize("names", [("full 1", "full 2", "lora 3"), ("lora 3", "lora 4")], ids=str)
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_threads_and_blocks_change_no_byte(names, density: float, models, tmp_path: Path) -> None:
    experts, config = [models[name] for name in names], NeuroMergingConfig(density, lambda_orthogonal="length")
    plan = plan_merge(experts, base_model=models["base"], config=config)
    want = merged_weights(plan, tmp_path / "want")
    got = merged_weights(plan, tmp_path / "got", threads=3, block_entries=150)
    assert got.method.lambda_orthogonal == want.method.lambda_orthogonal
    assert got.files == want.files


def test_recipe_report_and_card_name_the_rule_and_what_it_gave(models, tmp_path: Path) -> None:
    experts = [models["lora 3"], models["lora 4"]]
    config = NeuroMergingConfig(1.0, lambda_orthogonal="length")
    report = merge(experts, tmp_path / "merged", base_model=models["base"], config=config, **CPU)
    recipe = tmp_path / "merged" / "recipe.yaml"
    assert yaml.safe_load(recipe.read_text())["config"]["lambda_orthogonal"] == "length"
    assert report.settings["lambda_orthogonal"] == report.lambda_orthogonal
    card = (tmp_path / "merged" / "README.md").read_text()
    rule = "`length` (a rule of neuromerge_hf, not the paper's)"
    assert f"| `lambda_orthogonal` | {rule}, which gave {report.lambda_orthogonal:.4g} |" in card
    merge_recipe(recipe, tmp_path / "again", **CPU)
    assert contents(tmp_path / "again") == contents(tmp_path / "merged")


@pytest.mark.parametrize(("density", "passes"), [(1.0, 2), (0.2, 3)])
def test_the_plan_counts_its_pass(density: float, passes: int, models) -> None:
    config = NeuroMergingConfig(density, lambda_orthogonal="length")
    plan = plan_merge([models["full 1"], models["full 2"]], base_model=models["base"], config=config)
    assert plan.bytes_read == passes * sum(unit.bytes_read for unit in plan.units)


def test_a_weight_that_is_not_finite_is_named(models, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in models["full 1"].iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    config = NeuroMergingConfig(1.0, lambda_orthogonal="length")
    with pytest.raises(MergeError, match=r"model\.norm\.weight of damaged holds a NaN or an infinity"):
        merge([damaged, models["full 2"]], tmp_path / "merged", base_model=models["base"], config=config, **CPU)
    assert not (tmp_path / "merged").exists()


def test_it_is_an_option_of_the_command_line(models, tmp_path: Path) -> None:
    arguments = [str(models["lora 3"]), str(models["lora 4"]), "--base-model", str(models["base"])]
    arguments += ["--density", "1", "--lambda-orthogonal", "length", "--output", str(tmp_path / "merged")]
    result = CliRunner().invoke(app, ["merge", *arguments])
    assert result.exit_code == 0, result.output
    config = NeuroMergingConfig(1.0, lambda_orthogonal="length")
    merge([models["lora 3"], models["lora 4"]], tmp_path / "same", base_model=models["base"], config=config)
    assert flat(tmp_path / "merged").equal(flat(tmp_path / "same"))
