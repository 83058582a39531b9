"""The methods to compare. Each has a default setting, and most have six settings to tune on the validation texts.

Every method computes ``base + scale * direction``. Only the direction depends on the density, so one merge serves all
scales.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from neuromerge_hf import (
    AverageConfig,
    DARETIESConfig,
    IsoCConfig,
    NeuroIsoConfig,
    NeuroMergingConfig,
    PCBConfig,
    TaskArithmeticConfig,
    TIESConfig,
    TSVConfig,
)
from neuromerge_hf.config import MergeConfig


@dataclass(frozen=True)
class Setting:
    """A method with its hyper-parameters. `density` is None if the method has none."""

    method: str
    density: float | None
    scale: float

    def __str__(self) -> str:
        density = "" if self.density is None else f"-density{self.density:g}"
        return f"{self.method}{density}-scale{self.scale:g}"


@dataclass(frozen=True)
class Method:
    """A method to compare.

    Attributes:
        title: the method's name in tables.
        config: a function that returns the method's configuration at scale 1 for a density.
        default: the setting that the method's paper advises without validation data.
        tried: the settings to tune over; empty if the method is not tuned.
        scale: the name of the method's scale in tables.
    """

    title: str
    config: Callable[[float], MergeConfig]
    default: Setting
    tried: tuple[Setting, ...]
    scale: str = "lambda"


def _grid(method: str, densities: Sequence[float | None], scales: Sequence[float]) -> tuple[Setting, ...]:
    return tuple(Setting(method, density, scale) for density, scale in product(densities, scales))


OURS = "neuro_iso"
METHODS = {
    "average": Method("average", lambda _: AverageConfig(), Setting("average", None, 1), ()),
    "task_arithmetic": Method(
        "Task Arithmetic",
        lambda _: TaskArithmeticConfig(scale=1.0),
        Setting("task_arithmetic", None, 0.4),
        _grid("task_arithmetic", [None], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
    ),
    "ties": Method(
        "TIES",
        lambda density: TIESConfig(density=density, scale=1.0),
        Setting("ties", 0.2, 1),
        _grid("ties", [0.2, 0.5], [0.7, 1, 1.5]),
    ),
    "dare_ties": Method(
        "DARE-TIES",
        lambda density: DARETIESConfig(density=density, scale=1.0),
        Setting("dare_ties", 0.2, 1),
        _grid("dare_ties", [0.2, 0.5], [0.7, 1, 1.5]),
    ),
    "pcb": Method(
        "PCB",
        lambda density: PCBConfig(density=density, scale=1.0),
        Setting("pcb", 0.1, 1),
        _grid("pcb", [0.1, 0.2], [0.7, 1, 1.5]),
    ),
    "neuromerging": Method(
        "NeuroMerging",
        lambda density: NeuroMergingConfig(density=density),
        Setting("neuromerging", 0.2, 1),
        _grid("neuromerging", [0.2, 0.5], [0.7, 1, 1.5]),
        scale="share of the automatic lambda_2",
    ),
    # Its default was chosen on the validation texts of LoRA adapters: see "Open questions" in the README.
    "neuromerging_length": Method(
        "NeuroMerging by length",
        lambda density: NeuroMergingConfig(density=density, lambda_orthogonal="length"),
        Setting("neuromerging_length", 1.0, 1),
        (),
    ),
    "iso_c": Method(
        "Iso-C",
        lambda _: IsoCConfig(),
        Setting("iso_c", None, 1),
        _grid("iso_c", [None], [0.7, 1, 1.4, 2, 2.8, 4]),
    ),
    "tsv": Method(
        "TSV-M",
        lambda _: TSVConfig(),
        Setting("tsv", None, 1),
        _grid("tsv", [None], [0.3, 0.5, 0.7, 1, 1.4, 2]),
    ),
    # Its scale was chosen on validation texts of encoders, and on validation prompts of a language model.
    "neuro_iso": Method(
        "NeuroIso",
        lambda _: NeuroIsoConfig(),
        Setting("neuro_iso", None, 1),
        _grid("neuro_iso", [None], [0.7, 0.85, 1, 1.25, 1.5, 2]),
        scale="share of the default scale",
    ),
}
