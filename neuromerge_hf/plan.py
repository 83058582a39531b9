"""What a merge will do, and everything that is wrong with it, before any weight is read."""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
from transformers import PretrainedConfig

from neuromerge_hf.checkpoint import CHECKPOINT_FILES, find_weights, open_weights
from neuromerge_hf.config import NeuroMergingConfig
from neuromerge_hf.errors import MergeError, Problems
from neuromerge_hf.layout import Layout
from neuromerge_hf.location import Location
from neuromerge_hf.models import ModelId, find_models, load_config, unique_names
from neuromerge_hf.skeleton import Skeleton, model_class_of
from neuromerge_hf.sources.expert import Base, Expert, check_complete, is_mergeable, without_tied_copies
from neuromerge_hf.sources.full import check_architecture, open_full
from neuromerge_hf.sources.task_vector import TaskVector
from neuromerge_hf.tensors import StoredTensor


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
    problems = Problems()

    base_location, locations, adapters = find_models(models, base_model, token)
    base_config = load_config(base_location, trust_remote_code)
    base_class = model_class_of(base_config, base_location.folder, trust_remote_code)
    skeleton = Skeleton(base_class, base_config)
    expert_configs: list[PretrainedConfig | None] = []
    for location, adapter in zip(locations, adapters, strict=True):
        expert_configs.append(None if adapter else problems.attempt(partial(load_config, location, trust_remote_code)))
        if expert_configs[-1]:
            problems.add(check_architecture(location, expert_configs[-1], skeleton, base_location, trust_remote_code))
    problems.report()

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
    experts = problems.collect(openers)
    units = _units(base, experts, config, target)
    plan = MergePlan(
        config, base, tuple(experts), units, "auto" if target is None else str(target).removeprefix("torch.")
    )
    if not plan.merged:
        raise MergeError("No expert changes any parameter of the base that is not excluded. There is nothing to merge.")
    return plan


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The dtype of the output; None for "auto", each tensor's own dtype in the base."""
    if dtype == "auto":
        return None
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise MergeError(f'dtype must be "auto", "float32", "float16" or "bfloat16", not {dtype!r}.')
    return resolved


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
