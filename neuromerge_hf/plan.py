"""What a merge will do, and everything that is wrong with it, before any weight is read."""

import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from transformers import AutoConfig, PretrainedConfig

from neuromerge_hf.checkpoint import CHECKPOINT_FILES, find_weights, open_weights
from neuromerge_hf.config import NeuroMergingConfig
from neuromerge_hf.errors import MergeError
from neuromerge_hf.layout import Layout
from neuromerge_hf.location import Location, locate
from neuromerge_hf.skeleton import Skeleton, model_class_of
from neuromerge_hf.sources.expert import Base, Expert, check_complete, is_mergeable, without_tied_copies
from neuromerge_hf.sources.full import check_architecture, open_full
from neuromerge_hf.sources.task_vector import TaskVector
from neuromerge_hf.tensors import StoredTensor

if TYPE_CHECKING:
    from peft import LoraConfig

T = TypeVar("T")

ModelId = str | os.PathLike[str]


@dataclass(frozen=True)
class Unit:
    """One stored tensor of the base and what happens to it.

    Attributes:
        tensor: the base's.
        parameter: its name in the model; its name in the file if the model class does not know it.
        layout: how its entries form neurons; one row if it is not neuronal, one row an entry if it is copied.
        is_neuronal: whether it has neurons (ALGORITHM.md, section 1).
        task_vectors: one for each expert, None for an expert that does not change it; empty if it is copied.
        dtype: what it is written as.
    """

    tensor: StoredTensor
    parameter: str
    layout: Layout
    is_neuronal: bool
    task_vectors: tuple[TaskVector | None, ...]
    dtype: torch.dtype

    @property
    def changing(self) -> list[int]:
        """The experts that may change it, by their number."""
        return [expert for expert, vector in enumerate(self.task_vectors) if vector]

    @property
    def entries(self) -> int:
        """How many entries the tensor has."""
        return self.layout.rows * self.layout.width

    @property
    def nbytes(self) -> int:
        """The size that is written."""
        return self.entries * self.dtype.itemsize

    @property
    def bytes_read(self) -> int:
        """How much one pass over the base and the experts reads."""
        return self.entries * self.tensor.dtype.itemsize + sum(
            vector.bytes_read for vector in self.task_vectors if vector
        )


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do.

    Attributes:
        config: the hyper-parameters.
        base: the base model, opened.
        experts: the experts, opened, in the user's order.
        units: every tensor that will be written, in the order of their names, which is the order of all sums.
        dtype: the name of the dtype that was asked for, or "auto" for each tensor's own.
    """

    config: NeuroMergingConfig
    base: Base
    experts: tuple[Expert, ...]
    units: tuple[Unit, ...]
    dtype: str

    @property
    def merged(self) -> list[str]:
        """The parameters that at least one expert may change."""
        return [unit.parameter for unit in self.units if unit.task_vectors]

    @property
    def copied(self) -> list[str]:
        """The parameters and buffers that are copied from the base."""
        return [unit.parameter for unit in self.units if not unit.task_vectors]

    @property
    def architecture(self) -> str | None:
        """The merged model's class, if not the base's: the experts', where they agree and none has its own head."""
        classes = {expert.model_class_name for expert in self.experts}
        if len(classes) == 1 and not any(expert.head for expert in self.experts):
            return classes.pop()
        return None

    @property
    def bytes_written(self) -> int:
        """The size of the merged weights."""
        return sum(unit.nbytes for unit in self.units)

    @property
    def bytes_read(self) -> int:
        """How much is read in all: once for the thresholds, unless density is 1, and once for the merge."""
        passes = 1 if self.config.density == 1 else 2
        return sum(unit.bytes_read * (passes if unit.task_vectors else 1) for unit in self.units)


def plan_merge(
    models: Sequence[ModelId],
    *,
    base_model: ModelId | None = None,
    config: NeuroMergingConfig | None = None,
    dtype: str | torch.dtype = "auto",
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> MergePlan:
    """Find and check everything that a merge needs; see `neuromerge_hf.merge` for the arguments.

    Raises:
        MergeError: with all the problems that were found.
    """
    target = resolve_dtype(dtype)
    config = config or NeuroMergingConfig()
    problems: list[str] = []

    base_location, locations, adapters = find_models(models, base_model, token)
    base_config = load_config(base_location, trust_remote_code)
    base_class = model_class_of(base_config, base_location.folder, trust_remote_code)
    skeleton = Skeleton(base_class, base_config)
    expert_configs: list[PretrainedConfig | None] = []
    for location, adapter in zip(locations, adapters, strict=True):
        expert_configs.append(
            None if adapter else _attempt(problems, partial(load_config, location, trust_remote_code))
        )
        if expert_configs[-1]:
            problems += check_architecture(location, expert_configs[-1], skeleton, base_location, trust_remote_code)
    _raise(problems)

    for location in (base_location, *locations):
        location.fetch_weights()
    base = open_base(base_location, base_config, skeleton)
    names = unique_names(locations)
    openers: list[Callable[[], Expert]] = []
    for name, location, adapter, expert_config in zip(names, locations, adapters, expert_configs, strict=True):
        if adapter is not None:
            from neuromerge_hf.sources.lora import open_lora  # imports PEFT, which only adapters need

            openers.append(partial(open_lora, name, location, adapter, base))
        elif expert_config is not None:
            openers.append(partial(open_full, name, location, expert_config, base, trust_remote_code))
    experts = _collect(problems, openers)
    _raise(problems)
    units = _units(base, experts, config, target)
    plan = MergePlan(
        config, base, tuple(experts), units, "auto" if target is None else str(target).removeprefix("torch.")
    )
    if not plan.merged:
        raise MergeError("No expert changes any parameter of the base that is not excluded. There is nothing to merge.")
    return plan


def find_models(
    models: Sequence[ModelId], base_model: ModelId | None, token: str | bool | None
) -> "tuple[Location, list[Location], list[LoraConfig | None]]":
    """Where the base and the experts are, and the configurations of those that are adapters.

    Raises:
        MergeError: if one is not found, or is an adapter that cannot be merged.
    """
    if isinstance(models, str | os.PathLike) or not models:
        raise MergeError(
            f"models must be a list of at least one fine-tune or adapter (folders or ids on the Hub), not {models!r}."
        )
    problems: list[str] = []
    locations = _collect(problems, [partial(locate, model, token=token) for model in models])
    adapters = _collect(problems, [partial(_adapter_config, location) for location in locations])
    return _find_base(base_model, locations, adapters, token), locations, adapters


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The dtype of the output; None for "auto", each tensor's own dtype in the base."""
    if dtype == "auto":
        return None
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise MergeError(f'dtype must be "auto", "float32", "float16" or "bfloat16", not {dtype!r}.')
    return resolved


def load_config(location: Location, trust_remote_code: bool = False) -> PretrainedConfig:
    """A model's configuration.

    Raises:
        MergeError: if there is none, it is damaged, needs code that is not trusted, or is that of a quantised model.
    """
    if not (location.folder / "config.json").is_file():
        if (location.folder / "adapter_config.json").is_file():
            raise MergeError(f"{location} is an adapter, not a base. Give the model that it was trained on.")
        raise MergeError(f"{location} is no model: there is neither a config.json nor an adapter_config.json in it.")
    try:
        config = AutoConfig.from_pretrained(location.folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MergeError(f"{location.folder / 'config.json'} cannot be read: {error}") from error
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise MergeError(f"{location} is quantised ({method}). Give the model in float32, float16 or bfloat16 instead.")
    return config


def open_base(location: Location, config: PretrainedConfig, skeleton: Skeleton) -> Base:
    """Open the base's weights, from their headers alone."""
    main = find_weights(location.folder, CHECKPOINT_FILES)
    if main is None:
        raise MergeError(f"The base {location} has no weights: it holds none of {', '.join(CHECKPOINT_FILES)}.")
    tensors = open_weights(main)
    places = skeleton.places(tensors)
    tensors = without_tied_copies(tensors, places)
    known = {name: (place, tensors[name].shape) for name, place in places.items() if place and name in tensors}
    if not known:
        raise MergeError(
            f"{main} holds no parameter of the class {skeleton.model_class.__name__}. Check its config.json."
        )
    check_complete(location, skeleton, places, main)
    return Base(location, config, skeleton, tensors, places, skeleton.stored_layouts(known))


def unique_names(locations: Sequence[Location]) -> list[str]:
    """A name for each expert: the last part of its id, with a number where two are the same."""
    names: list[str] = []
    for location in locations:
        name, count = location.name, 1
        while name in names:
            count += 1
            name = f"{location.name}-{count}"
        names.append(name)
    return names


def check_disk(plan: MergePlan, folder: Path) -> None:
    """Raise a `MergeError` if the output does not fit on the disk of `folder`, which exists."""
    free = shutil.disk_usage(folder).free
    needed = plan.bytes_written + sum(expert.head.nbytes for expert in plan.experts if expert.head)
    if free < needed:
        raise MergeError(
            f"No space on the disk: the merged model needs {readable_size(needed)}, but only {readable_size(free)} are "
            f"free in {folder.parent}. Free some space or choose another output directory."
        )


def readable_size(count: float) -> str:
    """A number of bytes with three digits: "1.24 GB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _adapter_config(location: Location) -> "LoraConfig | None":
    if not (location.folder / "adapter_config.json").is_file():
        return None
    from neuromerge_hf.sources.lora import load_adapter_config  # imports PEFT, which only adapters need

    return load_adapter_config(location)


def _find_base(
    base_model: ModelId | None,
    locations: Sequence[Location],
    adapters: "Sequence[LoraConfig | None]",
    token: str | bool | None,
) -> Location:
    named = {
        (adapter.base_model_name_or_path, adapter.revision): location
        for location, adapter in zip(locations, adapters, strict=True)
        if adapter and adapter.base_model_name_or_path
    }
    if base_model is not None:
        return locate(base_model, token=token)
    if not named:
        raise MergeError(
            "No base model: none of the models is an adapter that names its base. Pass base_model= (--base-model), "
            "the model that they were all fine-tuned from."
        )
    if len(named) > 1:
        sides = "; ".join(f"{location} was trained on {base}" for (base, _), location in named.items())
        raise MergeError(
            f"The adapters name different bases: {sides}. Only experts of the same base can be merged; if these are "
            "names of the same model, pass base_model=."
        )
    ((base, revision),) = named
    try:
        return locate(base, revision=revision, token=token)
    except MergeError as error:
        raise MergeError(
            f"{next(iter(named.values()))} names its base {base!r}: {error} Or pass base_model=."
        ) from error


def _units(
    base: Base, experts: Sequence[Expert], config: NeuroMergingConfig, dtype: torch.dtype | None
) -> tuple[Unit, ...]:
    units = []
    unused = set(config.exclude)
    for name, tensor in sorted(base.tensors.items()):
        place = base.places[name]
        parameter = place.parameter if place else name
        excluding = {
            pattern for pattern in config.exclude if fnmatchcase(parameter, pattern) or fnmatchcase(name, pattern)
        }
        unused -= excluding
        vectors = [expert.task_vectors.get(place) for expert in experts] if place else []
        merged = is_mergeable(tensor) and not excluding and any(vectors)
        layout = base.layouts.get(name)
        units.append(
            Unit(
                tensor=tensor,
                parameter=parameter,
                layout=(layout or Layout.of(tensor.shape, None))
                if merged
                else Layout(1, 1, math.prod(tensor.shape), 1),
                is_neuronal=merged and layout is not None,
                task_vectors=tuple(vectors) if merged else (),
                dtype=dtype if dtype and is_mergeable(tensor) else tensor.dtype,
            )
        )
    if unused:
        raise MergeError(
            f"exclude={sorted(unused)} matches no parameter of {base.location}. "
            f"Its parameters have names such as {units[0].parameter}."
        )
    return tuple(units)


def _attempt(problems: list[str], step: Callable[[], T]) -> T | None:
    try:
        return step()
    except MergeError as error:
        problems += error.problems
        return None


def _collect(problems: list[str], steps: Sequence[Callable[[], T]]) -> list[T]:
    """The results of steps, whose problems are noted; stops after the last step if any failed."""
    results = [_attempt(problems, step) for step in steps]
    _raise(problems)
    return results  # type: ignore[return-value]  # without problems, none is a failure's None


def _raise(problems: list[str]) -> None:
    if problems:
        raise MergeError(problems)
