"""Merges models with extreme values: infinities, NaNs, the largest and smallest numbers of each dtype, rows of zeros.

They lie in the base, in fine-tunes, in an adapter, or in a head. The method, its hyper-parameters, the adapter's
scaling and the dtypes are extreme as well. A merge ends in a `MergeError` and nothing left behind, or in a complete
folder with finite weights. Where the merged weights are simple to state, they are those of a float64 computation.
"""

import functools
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from campaign import Case, Outcome
from neuromerge_hf import AverageConfig, MergeError, NeuroMergingConfig, TaskArithmeticConfig, merge
from neuromerge_hf.config import METHODS, MergeConfig, config_class
from neuromerge_hf.storage.files import HEADS
from tiny_models import save_adapter, save_bert, save_fine_tune

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OUTPUTS = ("auto", "float32", "bfloat16", "float16")
NUMBERS = (0.0, -0.0, 1.0, -1.0, 0.3, 1e-300, 1e-40, 1e-10, 1e4, 1e10, -1e20, 1e38, -1e39, 1e300)
"""Hyper-parameters, and values of weights beside the extremes of a dtype."""

FILES = {"base": "model.safetensors", "full": "model.safetensors", "task": "model.safetensors"}
ADAPTER = "adapter_model.safetensors"

CLASSIFIER = "BertForSequenceClassification"

COMPLETE = {"model.safetensors", "config.json", "recipe.yaml", "merge_report.json", "README.md"}


@functools.cache
def _models() -> tuple[TemporaryDirectory[str], Path]:
    """A base, a fine-tune, a fine-tune with a head, and an adapter with another head. They are deleted at the end."""
    kept = TemporaryDirectory(prefix="neuromerge-values-")
    root = Path(kept.name)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "max_position_embeddings": 8}
    base = save_bert(root / "base", **sizes)
    save_fine_tune(base, root / "full", seed=1)
    save_fine_tune(base, root / "task", seed=2, model_class=CLASSIFIER)
    save_adapter(base, root / "lora", seed=3, model_class=CLASSIFIER, task_type="SEQ_CLS", target_modules=["query"])
    return kept, root


def try_case(seed: int, folder: Path) -> Case:
    rng = random.Random(seed)
    shutil.copytree(_models()[1], folder / "models")
    models = folder / "models"
    told = [_cast(models / name / file, rng) for name, file in FILES.items() if rng.random() < 0.4]
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        name = rng.choice([*FILES, "lora"])
        told.append(f"{name} {_damage(models / name / FILES.get(name, ADAPTER), rng)}")
    if rng.random() < 0.2:
        told.append(_scale_adapter(models / "lora" / "adapter_config.json", rng))
    experts = rng.sample(["full", "task", "lora"], rng.choice([1, 2, 3]))
    config, dtype = _config(rng), rng.choice(OUTPUTS)
    told.append(f"{experts} {config} {dtype}")
    before = sorted(folder.rglob("*"))
    try:
        merge(
            [models / name for name in experts],
            folder / "merged",
            base_model=models / "base",
            config=config,
            dtype=dtype,
            device="cpu",
            threads=1,
        )
    except MergeError as error:
        left = set(folder.rglob("*")) - set(before)
        if left:
            return Case(seed, Outcome.LEFT_OVER, f"{'; '.join(told)}: {sorted(left)}")
        return Case(seed, Outcome.REFUSED, f"{'; '.join(told)}: {error}")
    wrong = _wrong(folder / "merged", models, experts, config)
    return Case(seed, Outcome.WRONG if wrong else Outcome.CORRECT, f"{'; '.join(told)}: {wrong}")


def _cast(file: Path, rng: random.Random) -> str:
    dtype = rng.choice(DTYPES)
    _save({name: t.to(dtype) if t.is_floating_point() else t for name, t in load_file(file).items()}, file)
    return f"{file.parent.name} in {dtype}"


def _damage(file: Path, rng: random.Random) -> str:
    """Put an extreme value into one entry, a row, or the whole of a tensor."""
    tensors = load_file(file)
    name = rng.choice(sorted(name for name, tensor in tensors.items() if tensor.is_floating_point()))
    tensor = tensors[name]
    limits = torch.finfo(tensor.dtype)
    value = rng.choice(
        [float("inf"), float("nan"), limits.max, -limits.max, limits.max / 2, limits.tiny, limits.tiny / 4, *NUMBERS]
    )
    rows = tensor.view(len(tensor), -1)
    place: Any = rng.choice([(slice(None), slice(None)), (rng.randrange(len(rows)), slice(None)), (0, 0)])
    rows[place] = torch.tensor(value, dtype=torch.float64).to(tensor.dtype)
    _save(tensors, file)
    return f"{name}{place} = {value}"


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})


def _scale_adapter(file: Path, rng: random.Random) -> str:
    alpha = rng.choice(NUMBERS)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": alpha}))
    return f"lora_alpha {alpha}"


def _config(rng: random.Random) -> MergeConfig:
    kind = config_class(rng.choice(list(METHODS)))
    values: dict[str, Any] = {}
    choices = {"density": (1.0, 0.2, 1e-9), "drop_rate": (0.0, 0.5, 1 - 2**-53), "weights": (None,), "seed": (0, 1)}
    for name in (each.name for each in fields(kind)):
        if name != "exclude" and rng.random() < 0.5:
            values[name] = rng.choice(choices.get(name, (1.0, 1.0, 0.5, *NUMBERS)))
    return kind(**values)


def _wrong(merged: Path, models: Path, experts: list[str], config: MergeConfig) -> str:
    """What is wrong with a finished merge; empty if nothing is."""
    missing = COMPLETE - {path.name for path in merged.iterdir()}
    if missing:
        return f"{sorted(missing)} missing"
    for file in (merged / "model.safetensors", *merged.glob(f"{HEADS}/*/*.safetensors")):
        for name, tensor in load_file(file).items():
            if not tensor.isfinite().all():
                return f"{name} in {file.name} is not finite"
    change = _reference(config, len(experts))
    if change is None or "lora" in experts:
        return ""
    base = load_file(models / "base" / "model.safetensors")
    theirs = [load_file(models / name / "model.safetensors") for name in experts]
    for name, tensor in load_file(merged / "model.safetensors").items():
        before = base[name]
        found = [tensors.get(name, tensors.get(f"bert.{name}", before)) for tensors in theirs]
        if before.is_floating_point():
            wrong = _difference(tensor, before.double(), [each.double() - before.double() for each in found], change)
            if wrong:
                return f"{name} {wrong}"
    return ""


Change = Callable[[list[Tensor]], Tensor]


def _reference(config: MergeConfig, experts: int) -> Change | None:
    """What a method adds to the base, from the task vectors in float64; None where it is not simple to state."""
    if isinstance(config, AverageConfig):
        return lambda taus: sum(taus, torch.zeros_like(taus[0])) / experts
    if isinstance(config, TaskArithmeticConfig):
        scale = config.scale
        return lambda taus: scale * sum(taus, torch.zeros_like(taus[0]))
    if experts == 1 and config == NeuroMergingConfig(density=1, lambda_parallel=1, lambda_orthogonal=1):
        return lambda taus: taus[0]
    return None


def _difference(got: Tensor, before: Tensor, taus: list[Tensor], change: Change) -> str:
    """How a merged tensor differs from the reference; empty if it agrees with it to the accuracy of its dtype."""
    want = before + change(taus)
    size = torch.stack([before.abs(), want.abs(), change([tau.abs() for tau in taus]).abs(), *[t.abs() for t in taus]])
    largest = size.amax(0)
    if largest.ndim > 1:  # a neuron's result has the accuracy of its largest weight
        largest = largest.amax(-1, keepdim=True).expand_as(want)
    limits = torch.finfo(got.dtype)
    allowed = 1e-5 * largest + limits.eps * want.abs() + limits.tiny + torch.finfo(torch.float32).tiny
    error = (got.double() - want).abs()
    at = int((error - allowed).argmax())
    if error.view(-1)[at] <= allowed.view(-1)[at]:
        return ""
    return f"is {got.view(-1)[at].item():.9g}, not {want.view(-1)[at].item():.9g}"
