"""A merge by the compiled kernel is that of torch but for the last bits, and says which of them computed it."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from families import Relatives
from neuromerge_hf import NeuroMergingConfig, TIESConfig, merge, merge_recipe, plan_merge
from neuromerge_hf.engine import cpu_kernel
from neuromerge_hf.engine.cpu_kernel import find_kernel, kernel_name, stored_dtype
from tiny_models import contents, save_adapter, save_fine_tune, save_llama

pytestmark = pytest.mark.skipif(kernel_name("cpu") == "torch", reason="numba is not installed, or turned off")

CPU = torch.device("cpu")
SETTINGS = {
    "defaults": NeuroMergingConfig(),
    "both parts": NeuroMergingConfig(density=0.3, lambda_parallel=0.5),
    "whole": NeuroMergingConfig(density=1),
    "by length": NeuroMergingConfig(density=0.4, lambda_orthogonal="length"),
    "thresholds alone": TIESConfig(),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Bases and experts: stored in bfloat16, in float32, in both, with an adapter, and with neurons in columns."""
    root = tmp_path_factory.mktemp("kernels")
    half = save_llama(root / "half", dtype="bfloat16")
    single = save_llama(root / "single")
    fused = Relatives("gpt-oss", root / "fused")
    halves = [save_fine_tune(half, root / f"half-{seed}", seed=seed) for seed in (1, 2, 3)]
    singles = [save_fine_tune(single, root / f"single-{seed}", seed=seed) for seed in (1, 2)]
    return {
        "bfloat16": [half, *halves],
        "float32": [single, *singles],
        "mixed": [half, halves[0], *singles],
        "adapter": [half, halves[0], save_adapter(half, root / "lora", seed=4)],
        "columns": [fused.base, fused.full(0), fused.full(1)],
    }


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    return monkeypatch


@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", ["bfloat16", "float32", "mixed", "adapter", "columns"])
def test_both_kernels_make_the_same_model_but_for_the_last_bits(models, kind, config, tmp_path, monkeypatch):
    base, *experts = models[kind]
    made = {}
    for name, off in (("numba", "0"), ("torch", "1")):
        monkeypatch.setenv("NUMBA_DISABLE_JIT", off)
        report = merge(experts, tmp_path / name, base_model=base, config=config, dtype="float32", device="cpu")
        assert report.environment["kernel"] == name
        made[name] = report, load_file(tmp_path / name / "model.safetensors")
    (one, ours), (other, want) = made["numba"], made["torch"]
    assert [expert.threshold for expert in one.experts] == [expert.threshold for expert in other.experts]
    assert (one.sigma or 0) == pytest.approx(other.sigma or 0, rel=1e-6)
    old = load_file(base / "model.safetensors")
    change = sum((want[name].double() - old[name].double()).square().sum() for name in want) ** 0.5
    difference = sum((want[name].double() - ours[name].double()).square().sum() for name in want) ** 0.5
    assert difference < 1e-4 * change


def test_the_report_the_recipe_and_the_plan_say_which_kernel_computes(models, tmp_path, without_numba):
    base, *experts = models["bfloat16"]
    assert "and torch" in str(plan_merge(experts, base_model=base, device="cpu"))
    merge(experts, tmp_path / "torch", base_model=base, device="cpu")
    without_numba.undo()
    assert "and numba" in str(plan_merge(experts, base_model=base, device="cpu"))
    merge(experts, tmp_path / "numba", base_model=base, device="cpu")
    for name in ("torch", "numba"):
        report = json.loads((tmp_path / name / "merge_report.json").read_text())
        versions = yaml.safe_load((tmp_path / name / "recipe.yaml").read_text())["versions"]
        assert report["environment"]["kernel"] == name
        assert ("numba" in versions) == ("numba" in report["environment"]) == (name == "numba")


def test_a_recipe_of_the_other_kernel_is_made_again_with_a_warning(models, tmp_path, without_numba, caplog):
    base, *experts = models["bfloat16"]
    merge(experts, tmp_path / "torch", base_model=base, device="cpu")
    merge_recipe(tmp_path / "torch" / "recipe.yaml", tmp_path / "same", device="cpu")
    assert contents(tmp_path / "same") == contents(tmp_path / "torch")
    assert not caplog.records
    without_numba.undo()
    merge_recipe(tmp_path / "torch" / "recipe.yaml", tmp_path / "other", device="cpu")
    assert "computed by torch, and this one by numba: their last bits may differ" in caplog.text
    assert "NUMBA_DISABLE_JIT=1" in caplog.text


@pytest.mark.parametrize("failure", ["import", "compiler"])
def test_torch_computes_the_merge_if_the_compiler_fails(models, tmp_path, monkeypatch, caplog, failure):
    def fail(*_: object) -> None:
        raise OSError("no space left for the cache")

    if failure == "import":
        monkeypatch.setattr(cpu_kernel, "_load", fail)
    else:
        monkeypatch.setattr("neuromerge_hf.compiled.combine", fail)
    base, *experts = models["bfloat16"]
    with caplog.at_level(logging.WARNING):
        report = merge(experts, tmp_path / "merged", base_model=base, config=NeuroMergingConfig(), device="cpu")
    assert report.environment["kernel"] == "torch"
    assert "The compiled kernel cannot be used (no space left for the cache). torch computes the merge" in caplog.text


def test_nothing_is_compiled_for_an_accelerator():
    assert find_kernel(torch.device("cuda"), []) is None


def test_blocks_are_read_as_they_are_stored_where_every_model_stores_bfloat16(models):
    found = {}
    for kind, (base, *experts) in models.items():
        units = plan_merge(experts, base_model=base, config=NeuroMergingConfig()).work.merged
        found[kind] = {stored_dtype(unit) for unit in units if unit.is_neuronal}
    half, single = torch.bfloat16, torch.float32
    assert found["bfloat16"] == {half}
    assert found["float32"] == found["mixed"] == {single}
    assert found["adapter"] == {half, single}, "the adapter changes some of the weights"
    assert single in found["columns"]


def test_importing_the_library_or_planning_loads_no_compiler(models, tmp_path):
    base, *experts = models["bfloat16"]
    code = (
        "import sys\nfrom neuromerge_hf import plan_merge\n"
        f"plan_merge({[str(expert) for expert in experts]!r}, base_model={str(base)!r}, device='cpu')\n"
        "assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=dict(os.environ))


def test_the_kernel_is_compiled_where_no_cache_can_be_written(models, tmp_path):
    """numba looks for a folder when a function is defined, and raises an error if there is none."""
    code = (
        "from numba.core import caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "import torch\nfrom neuromerge_hf.engine.cpu_kernel import find_kernel\n"
        "kernel = find_kernel(torch.device('cpu'), [])\n"
        "print(kernel.gram_matrix(torch.ones(2, 1, 3), [0.0]).tolist())"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert found.stdout.strip() == "[[[3.0, 3.0], [3.0, 3.0]]]", found.stderr


def test_functions_that_numba_did_not_compile_are_not_used(models, tmp_path):
    """numba reads its settings when it is imported, which may be before they are changed."""
    code = (
        "import os\nos.environ['NUMBA_DISABLE_JIT'] = '1'\nimport numba\ndel os.environ['NUMBA_DISABLE_JIT']\n"
        "import torch\nfrom neuromerge_hf.engine.cpu_kernel import find_kernel\n"
        "assert find_kernel(torch.device('cpu'), []) is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
