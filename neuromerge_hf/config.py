"""The hyper-parameters of a merge: a frozen dataclass for each method, checked when it is made."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from neuromerge_hf.errors import MergeError


@dataclass(frozen=True)
class MergeConfig:
    """What the hyper-parameters of all methods have in common.

    Args:
        exclude: patterns (as in a shell: ``*``, ``?``, ``[...]``) of parameter names that stay as they are in the base.

    Attributes:
        method: the method's name in recipes, in reports and on the command line.

    Raises:
        MergeError: if a value is out of range.
    """

    method: ClassVar[str]

    exclude: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.exclude, list | tuple) or not all(isinstance(pattern, str) for pattern in self.exclude):
            raise MergeError(f"exclude must be a tuple or list of patterns of parameter names, not {self.exclude!r}.")
        object.__setattr__(self, "exclude", tuple(self.exclude))

    @property
    def passes(self) -> int:
        """How often the task vectors are read, if nothing is read again because a prediction missed."""
        return 1

    def to_dict(self) -> dict[str, Any]:
        """The values as plain Python objects, ready for YAML or JSON."""
        values = dataclasses.asdict(self)
        del values["exclude"]
        return {**values, "exclude": list(self.exclude)}


@dataclass(frozen=True)
class NeuroMergingConfig(MergeConfig):
    """The hyper-parameters of NeuroMerging (Fang et al., arXiv:2503.05320), checked when they are set.

    Args:
        density: the fraction of each task vector's entries that is kept, 0 < density <= 1 (the paper's trimming keeps
            the largest magnitudes of the whole model).
        lambda_parallel: the paper's lambda_1, the weight of the merged parallel part.
        lambda_orthogonal: the paper's lambda_2, the weight of the merged orthogonal part and of the parameters that
            are not neuronal. "auto" is the paper's choice without validation data, 1 / (1 - sigma), where sigma is the
            largest share of a task vector's L1 norm that was trimmed. "length" is a rule of this library, for one more
            pass over the weights: the merged task vector becomes 1.4 times as long as the experts' are on average, or
            less where they agree (see `methods.length_rule`).
        exclude: patterns (as in a shell: ``*``, ``?``, ``[...]``) of parameter names that stay as they are in the base.

    Raises:
        MergeError: if a value is out of range.
    """

    method = "neuromerging"

    density: float = 0.2
    lambda_parallel: float = 0.0
    lambda_orthogonal: float | Literal["auto", "length"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_density(self.density)
        _check_number("lambda_parallel", self.lambda_parallel)
        if self.lambda_orthogonal not in ("auto", "length") and not _is_number(self.lambda_orthogonal):
            raise MergeError(
                f'lambda_orthogonal must be "auto", "length" or a finite number, not {self.lambda_orthogonal!r}.'
            )

    @property
    def passes(self) -> int:
        return 1 + (self.density < 1) + (self.lambda_orthogonal == "length")


@dataclass(frozen=True)
class AverageConfig(MergeConfig):
    """Simple averaging: the mean of the experts' weights.

    Args:
        exclude: patterns of parameter names that stay as they are in the base.
    """

    method = "average"


@dataclass(frozen=True)
class TaskArithmeticConfig(MergeConfig):
    """The hyper-parameters of Task Arithmetic (Ilharco et al., arXiv:2212.04089).

    Args:
        scale: the paper's lambda, the weight of the sum of the task vectors. 0.4 is customary without validation data.
        exclude: patterns of parameter names that stay as they are in the base.
    """

    method = "task_arithmetic"

    scale: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number("scale", self.scale)


@dataclass(frozen=True)
class TIESConfig(MergeConfig):
    """The hyper-parameters of TIES-Merging (Yadav et al., arXiv:2306.01708), by default the paper's without validation.

    Args:
        density: the fraction of each task vector's entries that is kept: the largest of the whole model.
        scale: the paper's lambda, the weight of the merged task vector.
        exclude: patterns of parameter names that stay as they are in the base.
    """

    method = "ties"

    density: float = 0.2
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_density(self.density)
        _check_number("scale", self.scale)

    @property
    def passes(self) -> int:
        return 1 if self.density == 1 else 2


@dataclass(frozen=True)
class DARETIESConfig(MergeConfig):
    """The hyper-parameters of DARE (Yu et al., arXiv:2311.03099) before TIES-Merging.

    Args:
        drop_rate: the probability with which an entry of a task vector is dropped, 0 <= drop_rate < 1; what is kept is
            divided by 1 - drop_rate. 0.2 is that of an example of the authors'; the paper advises no single one.
        density: what TIES then keeps of each task vector, as the authors trim after dropping. 1 trims nothing, which is
            what other tools call DARE-TIES.
        scale: the weight of the merged task vector.
        seed: of the random numbers, which depend on nothing else but the expert, the parameter and the position.
        exclude: patterns of parameter names that stay as they are in the base.
    """

    method = "dare_ties"

    drop_rate: float = 0.2
    density: float = 0.2
    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _is_number(self.drop_rate) or not 0 <= self.drop_rate < 1:
            raise MergeError(f"drop_rate must be a number with 0 <= drop_rate < 1, not {self.drop_rate!r}.")
        _check_density(self.density)
        _check_number("scale", self.scale)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 1 << 64:
            raise MergeError(f"seed must be an integer with 0 <= seed < 2**64, not {self.seed!r}.")

    @property
    def passes(self) -> int:
        return 1 if self.density == 1 else 2


@dataclass(frozen=True)
class PCBConfig(MergeConfig):
    """The hyper-parameters of PCB-Merging (Du et al., arXiv:2410.02396), by default those of the authors' code.

    Args:
        density: the fraction of each task vector's entries that is kept, those of the highest scores: the paper's mask
            ratio r.
        scale: the paper's lambda, the weight of the merged task vector.
        exclude: patterns of parameter names that stay as they are in the base.
    """

    method = "pcb"

    density: float = 0.1
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_density(self.density)
        _check_number("scale", self.scale)

    @property
    def passes(self) -> int:
        return 4  # two for the extreme magnitudes, one for the scores


CONFIGS: dict[str, type[MergeConfig]] = {
    config.method: config
    for config in (NeuroMergingConfig, AverageConfig, TaskArithmeticConfig, TIESConfig, DARETIESConfig, PCBConfig)
}
"""The configurations by the names of their methods."""


def config_class(method: object) -> type[MergeConfig]:
    """The configuration of a method.

    Raises:
        MergeError: if there is no such method.
    """
    if not isinstance(method, str) or method not in CONFIGS:
        raise MergeError(f"method must be one of {', '.join(CONFIGS)}, not {method!r}.")
    return CONFIGS[method]


def _check_density(value: object) -> None:
    if not _is_number(value) or not 0 < value <= 1:  # type: ignore[operator]
        raise MergeError(f"density must be a number with 0 < density <= 1, not {value!r}.")


def _check_number(name: str, value: object) -> None:
    if not _is_number(value):
        raise MergeError(f"{name} must be a finite number, not {value!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
