"""What rounding to the dtype of the output leaves of the merged change. `engine.rounding` measures it."""

from dataclasses import dataclass
from typing import Any

WARN_ABOVE = 0.05
"""The loss above which a merge warns."""


@dataclass(frozen=True)
class KindRounding:
    """What rounding leaves of the merged change of parameters of one kind.

    The *merged change* is what the method adds to the base, the *written change* what the file holds more than the
    base. Rounding drops a change that is much smaller than the step between two numbers of the dtype, and enlarges one
    that is a little larger than half a step. So the written change is noisy, yet nearly as long as the merged one until
    most of it is dropped; `cosine` and `norm_ratio` tell one from the other.

    Attributes:
        kind: the name of the parameters, with ``*`` for the numbers in it.
        lost: the loss: the squared norm of (written change - merged change) divided by that of the merged change. It is
            0 if nothing is lost, and 1 if all is. It can exceed 1 if the base has a wider dtype than the output,
            because the base's own weights are then rounded, too.
        cosine: the cosine between the written and the merged change; None if nothing of the change is written.
        norm_ratio: the norm of the written change divided by that of the merged change.
    """

    kind: str
    lost: float
    cosine: float | None
    norm_ratio: float


@dataclass(frozen=True)
class Rounding:
    """What rounding leaves of the merged change, in all parameters that are written in 16 bits.

    Attributes:
        dtype: the dtype of the output.
        model: all these parameters together.
        kinds: the parameters of each kind, in the order of the model.
    """

    dtype: str
    model: KindRounding
    kinds: list[KindRounding]

    @property
    def sentence(self) -> str:
        """A summary in one sentence."""
        share = f"{min(1.0, self.model.lost):.1%}"
        if self.model.cosine is None:
            return f"Rounding to {self.dtype} lost all of the merged change."
        return (
            f"Rounding to {self.dtype} lost {share} of the merged change: what is written has the cosine "
            f"{self.model.cosine:.3f} with it and is {self.model.norm_ratio:.3f} times as long."
        )

    @property
    def warning(self) -> str | None:
        """A warning that says what to do; None if the loss is small."""
        if self.model.lost <= WARN_ABOVE:
            return None
        return f'{self.sentence} Merge with dtype="float32" (--dtype float32) to keep it.'


def load_rounding(values: dict[str, Any]) -> Rounding:
    """Restore a `Rounding` from the dictionary that `dataclasses.asdict` made of it."""
    kinds = [KindRounding(**kind) for kind in values["kinds"]]
    return Rounding(values["dtype"], KindRounding(**values["model"]), kinds)
