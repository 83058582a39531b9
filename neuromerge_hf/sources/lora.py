"""Plain LoRA adapters. Their task vectors ``scaling * B @ A`` are computed a block of rows at a time."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftType
from peft.utils.other import get_pattern_key
from torch import Tensor

from neuromerge_hf.errors import MergeError
from neuromerge_hf.skeleton import ParameterRef
from neuromerge_hf.sources.base import Base
from neuromerge_hf.sources.task_vector import LowRank, TaskVector
from neuromerge_hf.storage.finite import is_finite
from neuromerge_hf.storage.layout import Block, Layout
from neuromerge_hf.storage.location import Location
from neuromerge_hf.storage.tensors import StoredTensor, read_whole

NEUTRAL_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Values of LoraConfig.init_lora_weights that leave the base's weights unchanged."""

VARIANTS = (
    "use_dora",
    "lora_bias",
    "target_parameters",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)
"""Options of a LoraConfig with which the task vector is not ``scaling * B @ A``, so that PEFT must compute it."""

FACTOR = re.compile(r"\.lora_(embedding_)?(?P<side>[AB])(\.weight)?$")


def variants(config: LoraConfig) -> list[str]:
    """The options and the initialisation that distinguish an adapter from plain LoRA."""
    found = [option for option in VARIANTS if getattr(config, option, None)]
    if config.init_lora_weights not in NEUTRAL_INITIALISATIONS:
        found.append(str(config.init_lora_weights))
    return found


def is_plain(config: LoraConfig) -> bool:
    """Whether the task vector of each module is ``scaling * B @ A``, so that it need not be computed whole."""
    return config.peft_type == PeftType.LORA and not variants(config)


@dataclass(frozen=True)
class StoredLoRA:
    """The task vector of a LoRA module. Its factors are read by `opened`, once for all blocks of a tensor.

    Attributes:
        a: (r, in), followed by the kernel's axes for a convolution; (r, tokens) for an embedding.
        b: (out, r), or (dim, r) for an embedding.
        scaling: the factor of the product ``b @ a``.
        is_embedding: whether the product is added to the weight as ``(b @ a).T``.
        layout: how the entries of the weight form neurons.
        module: the name of the module, for messages.
        stored: the task vector to which the product is added, if the adapter also stores the whole weight.
    """

    a: StoredTensor
    b: StoredTensor
    scaling: float
    is_embedding: bool
    layout: Layout
    module: str
    stored: TaskVector | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def file(self) -> str:
        return str(self.a.path)

    @property
    def bytes_read(self) -> int:
        return self._factor_bytes + (self.stored.bytes_read if self.stored else 0)

    @property
    def _factor_bytes(self) -> int:
        return sum(math.prod(factor.shape) * factor.dtype.itemsize for factor in (self.a, self.b))

    def fits(self) -> bool:
        """Whether the shapes of the factors fit the weight."""
        rows, columns = (self.a, self.b) if self.is_embedding else (self.b, self.a)
        return (
            self.b.shape[1] == self.rank
            and self.layout.rows * self.rank == math.prod(rows.shape)
            and self.layout.width * self.rank == math.prod(columns.shape)
        )

    def opened(self) -> LowRank:
        """Read the factors as float32 to the CPU.

        Raises:
            MergeError: if a factor holds a NaN or an infinity, or exceeds float32 with the adapter's scaling.
        """
        a, b = (read_whole(factor).float() for factor in (self.a, self.b))
        if not (is_finite(a) and is_finite(b)):
            raise MergeError(
                f"{self.file}: lora_A or lora_B of {self.module} holds a NaN or an infinity. "
                "A damaged adapter cannot be merged: train or download it again, or leave it out."
            )
        left, right = (a.T, b.T) if self.is_embedding else (b, a)
        left = (self.scaling * left.flatten(1)).contiguous()
        if not is_finite(left):
            raise MergeError(
                f"{self.file}: lora_B of {self.module} times the scaling {self.scaling:g} exceeds float32. Correct "
                "lora_alpha in its adapter_config.json, or leave the adapter out."
            )
        return LowRank(left, right.flatten(1).contiguous(), self.layout, self.file, self.stored, self._factor_bytes)

    def low_rank(self) -> LowRank | None:
        return None if self.stored else self.opened()

    def write(self, out: Tensor, block: Block, base: Tensor, buffer: Tensor) -> None:
        self.opened().write(out, block, base, buffer)


def open_factors(
    location: Location,
    file: Path,
    tuned: Mapping[str, dict[str, StoredTensor]],
    config: LoraConfig,
    base: Base,
    stored: Mapping[ParameterRef, TaskVector],
) -> tuple[dict[ParameterRef, StoredLoRA], list[str]]:
    """Open the task vectors of a plain LoRA adapter.

    Args:
        file: the adapter's weight file, for messages.
        tuned: the factors of each module.
        stored: the task vectors of weights that the adapter stores whole.

    Returns:
        The task vectors, and the problems that were found.
    """
    refs = base.skeleton.refs(f"{module}.weight" for module in tuned)
    vectors: dict[ParameterRef, StoredLoRA] = {}
    problems: list[str] = []
    for module, tensors in tuned.items():
        ref = refs[f"{module}.weight"]
        found = base.at(ref)
        sides = {match["side"]: tensor for key, tensor in tensors.items() if (match := FACTOR.search(key))}
        unknown = sorted(key for key in tensors if not FACTOR.search(key))
        if unknown:
            problems.append(
                f"{file} holds {unknown[0]}, which is no part of a LoRA adapter as its adapter_config.json describes "
                "it. Save the adapter again."
            )
        elif set(sides) != {"A", "B"}:
            problems.append(f"{file} holds only one of lora_A and lora_B of {module}. Save the adapter again.")
        elif len(tensors) > 2:
            problems.append(f"{file} holds several of lora_A or lora_B of {module}. Save the adapter again.")
        elif min(len(tensor.shape) for tensor in sides.values()) < 2:
            problems.append(f"lora_A or lora_B of {module} in {file} is no matrix. Save the adapter again, gathered.")
        elif ref is None or found is None:
            problems.append(base.missing_module_message(location, module))
        elif base.is_tied(ref):
            problems.append(base.cannot_untie_message(location, module))
        else:
            a, b = sides["A"], sides["B"]
            is_embedding = any(".lora_embedding_" in key for key in tensors)
            try:
                r, scaling = _option(module, config.rank_pattern, config.r), _scaling(module, config)
            except (re.error, TypeError, ValueError, AttributeError, ArithmeticError) as error:
                problems.append(
                    f"r, lora_alpha or their patterns in {location.folder / 'adapter_config.json'} are not valid for "
                    f"{module} ({error}). Save the adapter again."
                )
                continue
            factors = StoredLoRA(a, b, scaling, is_embedding, found[1], module, stored.get(ref))
            if factors.rank != r or r < 1:
                problems.append(
                    f"lora_A of {module} in {file} has the rank {factors.rank}, but its adapter_config.json says {r} "
                    "(r or rank_pattern), and PEFT refuses to load it. Save the adapter again with its own "
                    "configuration."
                )
            elif factors.fits():
                vectors[ref] = factors
            else:
                problems.append(
                    f"lora_A {a.shape} and lora_B {b.shape} of {module} in {file} do not fit. "
                    f"The base's {module}.weight is {found[0].shape}. Check base_model."
                )
    return vectors, problems


def _scaling(module: str, config: LoraConfig) -> float:
    """The factor of a module's product ``B @ A``.

    Raises:
        ValueError: if it is not a finite number.
    """
    alpha = _option(module, config.alpha_pattern, config.lora_alpha)
    r = _option(module, config.rank_pattern, config.r)
    scaling = float(alpha / (r**0.5 if config.use_rslora else r))
    if not math.isfinite(scaling):
        raise ValueError(f"lora_alpha is {alpha}")
    return scaling


def _option(module: str, pattern: Mapping[str, Any] | None, default: Any) -> Any:
    """An option of a module, as PEFT finds it in rank_pattern or alpha_pattern."""
    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), module), default)


def ranks(task_vectors: Mapping[ParameterRef, TaskVector]) -> list[str]:
    """The ranks of the low-rank task vectors, such as ["r=4/8"]; empty if there are none."""
    found = sorted({vector.rank for vector in task_vectors.values() if vector.rank})
    return [f"r={'/'.join(map(str, found))}"] if found else []
