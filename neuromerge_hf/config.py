"""The hyper-parameters of a merge."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from neuromerge_hf.errors import MergeError


@dataclass(frozen=True)
class NeuroMergingConfig:
    """The hyper-parameters of NeuroMerging (Fang et al., arXiv:2503.05320), checked when they are set.

    Args:
        density: the fraction of each task vector's entries that is kept, 0 < density <= 1 (the paper's trimming keeps
            the largest magnitudes of the whole model).
        lambda_parallel: the paper's lambda_1, the weight of the merged parallel part.
        lambda_orthogonal: the paper's lambda_2, the weight of the merged orthogonal part and of the parameters that
            are not neuronal. "auto" is the paper's choice without validation data, 1 / (1 - sigma), where sigma is the
            largest share of a task vector's L1 norm that was trimmed.
        exclude: patterns (as in a shell: ``*``, ``?``, ``[...]``) of parameter names that stay as they are in the base.

    Raises:
        MergeError: if a value is out of range.
    """

    density: float = 0.2
    lambda_parallel: float = 0.0
    lambda_orthogonal: float | Literal["auto"] = "auto"
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _is_number(self.density) or not 0 < self.density <= 1:
            raise MergeError(f"density must be a number with 0 < density <= 1, not {self.density!r}.")
        if not _is_number(self.lambda_parallel):
            raise MergeError(f"lambda_parallel must be a finite number, not {self.lambda_parallel!r}.")
        if self.lambda_orthogonal != "auto" and not _is_number(self.lambda_orthogonal):
            raise MergeError(f'lambda_orthogonal must be "auto" or a finite number, not {self.lambda_orthogonal!r}.')
        if not isinstance(self.exclude, list | tuple) or not all(isinstance(pattern, str) for pattern in self.exclude):
            raise MergeError(f"exclude must be a tuple or list of patterns of parameter names, not {self.exclude!r}.")
        object.__setattr__(self, "exclude", tuple(self.exclude))

    def to_dict(self) -> dict[str, Any]:
        """The values as plain Python objects, ready for YAML or JSON."""
        return {**dataclasses.asdict(self), "exclude": list(self.exclude)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
