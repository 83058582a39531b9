"""The base class of the methods' configurations, and the table of the methods."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from typing import Any, ClassVar, TypeGuard

from neuromerge_hf.errors import MergeError
from neuromerge_hf.options import option

DEFAULT_METHOD = "neuro_iso"
"""The method of a merge that names none."""

FIRST_METHOD = "neuromerging"
"""The method of recipes and reports that name none, because they were written when it was the only one."""

METHODS = {
    "neuromerging": "neuromerge_hf.methods.neuromerging:NeuroMergingConfig",
    "average": "neuromerge_hf.methods.average:AverageConfig",
    "task_arithmetic": "neuromerge_hf.methods.task_arithmetic:TaskArithmeticConfig",
    "ties": "neuromerge_hf.methods.ties:TIESConfig",
    "dare_ties": "neuromerge_hf.methods.dare:DARETIESConfig",
    "pcb": "neuromerge_hf.methods.pcb:PCBConfig",
    "neuro_iso": "neuromerge_hf.methods.neuro_iso:NeuroIsoConfig",
    "iso_c": "neuromerge_hf.methods.iso_c:IsoCConfig",
    "tsv": "neuromerge_hf.methods.tsv:TSVConfig",
}
"""The configuration class of each method, as "module:class". It is imported on first use.

Add a method of your own here to use it in recipes, cards and comparisons.
"""

CLASS_ATTRIBUTES = ("method", "title", "paper", "summary")


@dataclass(frozen=True)
class MergeConfig:
    """The hyper-parameters of a merging method.

    A subclass is a frozen dataclass whose fields are made with `neuromerge_hf.options.option`. What plans, reports and
    cards ask about a method is a class attribute or a property. Those with a value here need none in a subclass.

    Attributes:
        method: the method's name in recipes, in reports and on the command line.
        title: the method's name in prose.
        paper: the URL of the paper that describes the method.
        summary: a few lines on what the method does.
        citation: the paper's BibTeX entry; None if the card is to name the paper alone.
        own_rules: names of hyper-parameters, each with a value that is a rule of this library and not of the paper.
        by_neuron: whether weights are merged neuron by neuron. `Method.merge_block` then records the statistics of
            each block, which report and card show.
        by_matrix: whether matrices of linear layers are merged whole. `Method.find_change` then merges them, and
            `Method.merge_block` everything else. Report and card show statistics of the untrimmed task vectors.
        bytes_per_entry: an estimate of the memory that `Method.merge_block` needs for each entry of a block, besides
            its input and its result, in bytes.
        exclude: names of parameters to copy from the base, as shell patterns (``*``, ``?``, ``[...]``).

    Raises:
        MergeError: if a value is out of range.
    """

    method: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    citation: ClassVar[str | None] = None
    own_rules: ClassVar[Mapping[str, str]] = {}
    by_neuron: ClassVar[bool] = False
    by_matrix: ClassVar[bool] = False
    bytes_per_entry: ClassVar[int] = 32  # for sums, counts, scores, or random numbers

    exclude: tuple[str, ...] = option((), "names of parameters to leave unmerged, as patterns", kw_only=True)

    def __init_subclass__(cls, *, abstract: bool = False) -> None:
        super().__init_subclass__()
        missing = [name for name in CLASS_ATTRIBUTES if not abstract and not hasattr(cls, name)]
        if missing:
            raise TypeError(f"{cls.__name__} lacks the class attributes {', '.join(missing)}, which its card shows.")

    def __post_init__(self) -> None:
        if not isinstance(self.exclude, list | tuple) or not all(isinstance(pattern, str) for pattern in self.exclude):
            raise MergeError(f"exclude must be a tuple or list of patterns of parameter names, not {self.exclude!r}.")
        object.__setattr__(self, "exclude", tuple(self.exclude))

    @property
    def passes(self) -> int:
        """How many passes read the task vectors, if all predicted ranges of thresholds are right."""
        return 1

    @property
    def finds_thresholds(self) -> bool:
        """Whether the first pass fills a histogram and a sample for each expert."""
        return self.passes > 1

    def spectra(self, experts: int) -> int:
        """How many spectra a matrix needs that so many experts change, if the configuration has `by_matrix`."""
        return 1

    def expert_weights(self, experts: int) -> tuple[float, ...]:
        """Return the weight of each expert in a mean that is not the method's own: of heads, and of new tokens' rows.

        Args:
            experts: the number of experts. Planning calls this, so a method that needs a certain number can refuse it.

        Raises:
            MergeError: if the configuration does not fit this number.
        """
        return (1.0,) * experts

    def to_dict(self) -> dict[str, Any]:
        """Return the values as plain Python objects, for YAML or JSON."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        exclude = values.pop("exclude")
        return {**values, "exclude": exclude}


def parse_weights(text: str) -> tuple[float, ...]:
    """Return the weights in "0.2,0.3,0.5"."""
    return tuple(float(number) for number in text.split(","))


@dataclass(frozen=True)
class WeightedConfig(MergeConfig, abstract=True):
    """The hyper-parameters of a method in which each expert can have a weight.

    Attributes:
        weights: the weight of each expert, in their order; None for equal weights. Heads that are merged
            (`merge_heads`), and the rows of tokens that the base lacks, have the same weights.
    """

    weights: tuple[float, ...] | None = option(
        None,
        "the weight of each expert",
        shown="equal weights",
        command_line={"parser": parse_weights, "metavar": "<float,float,...>"},
        kw_only=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None:
            object.__setattr__(self, "weights", check_weights("weights", self.weights))

    def expert_weights(self, experts: int) -> tuple[float, ...]:
        if self.weights is None:
            return super().expert_weights(experts)
        if len(self.weights) != experts:
            raise MergeError(
                f"weights has {len(self.weights)} entries ({', '.join(f'{weight:g}' for weight in self.weights)}), but "
                f"there are {experts} experts. Give one for each, in their order."
            )
        return self.weights


def config_class(method: object) -> type[MergeConfig]:
    """Return the configuration class of a method.

    Raises:
        MergeError: if there is no such method.

    Examples:
        >>> config_class("ties")(density=0.5).to_dict()
        {'weights': None, 'density': 0.5, 'scale': 1.0, 'exclude': []}
    """
    if not isinstance(method, str) or method not in METHODS:
        raise MergeError(f"method must be one of {', '.join(METHODS)}, not {method!r}.")
    module, _, name = METHODS[method].partition(":")
    found: type[MergeConfig] = getattr(import_module(module), name)
    return found


def as_config(value: object) -> MergeConfig:
    """Return a configuration from what users give for one.

    Args:
        value: a configuration; the name of a method; or a dictionary of hyper-parameters, whose "method" names the
            method (the default one if there is none).

    Raises:
        MergeError: if it is none of these, or a hyper-parameter is unknown or out of range.

    Examples:
        >>> as_config({"method": "ties", "density": 0.5}).to_dict()
        {'weights': None, 'density': 0.5, 'scale': 1.0, 'exclude': []}
    """
    if isinstance(value, MergeConfig):
        return value
    if isinstance(value, str):
        return config_class(value)()
    if isinstance(value, Mapping):
        settings = dict(value)
        kind = config_class(settings.pop("method", DEFAULT_METHOD))
        known = [field.name for field in fields(kind)]
        for name in settings:
            if name not in known:
                raise MergeError(f"config has {name!r}, but {kind.method} only has {', '.join(known)}.")
        return kind(**settings)
    if isinstance(value, type) and issubclass(value, MergeConfig):
        raise MergeError(f"config must be a configuration, not the class of one: write {value.__name__}().")
    raise MergeError(
        f'config must be a configuration such as NeuroMergingConfig(density=0.2), the name of a method ("ties"), or a '
        f"dictionary of hyper-parameters, not {value!r:.200}."
    )


def config_classes() -> list[type[MergeConfig]]:
    """Return the configuration classes of all methods, in the order of `METHODS`."""
    return [config_class(method) for method in METHODS]


def default_config() -> MergeConfig:
    """Return the configuration of a merge that names none."""
    return config_class(DEFAULT_METHOD)()


def check_density(value: object) -> None:
    """Raise a `MergeError` unless `value` is a density: the fraction of the entries that a method keeps."""
    if not is_number(value) or not 0 < value <= 1:
        raise MergeError(f"density must be a number with 0 < density <= 1, not {value!r}.")


def check_number(name: str, value: object) -> None:
    """Raise a `MergeError` unless `value`, of the hyper-parameter `name`, is a finite number."""
    if not is_number(value):
        raise MergeError(f"{name} must be a finite number, not {value!r}.")


def check_weights(name: str, weights: object) -> tuple[float, ...]:
    """Return the weights of a mean as a tuple.

    Raises:
        MergeError: unless they are finite numbers above 0.
    """
    values = tuple(weights) if isinstance(weights, list | tuple) else ()
    if not values or not all(is_number(value) and value > 0 for value in values):
        raise MergeError(f"{name} must be numbers above 0, such as (1, 2, 3), not {weights!r}.")
    return values


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a finite int or float."""
    if isinstance(value, int) and value.bit_length() > 1000:  # no float holds it
        return False
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
