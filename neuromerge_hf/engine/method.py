"""The interface between the engine and a method, and steps that several methods share.

Importing this module does not import torch, so the command line can list methods and their options at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, TypeVar

from neuromerge_hf.config import MergeConfig, WeightedConfig
from neuromerge_hf.engine.trimming import Trimming
from neuromerge_hf.errors import MergeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch
    from torch import Tensor

    from neuromerge_hf.engine.block_statistics import BlockStatistics
    from neuromerge_hf.engine.low_rank import StackedFactors
    from neuromerge_hf.engine.matrices import Matrix
    from neuromerge_hf.engine.passes import Passes
    from neuromerge_hf.sources.unit import Unit
    from neuromerge_hf.spectrum import Factors
    from neuromerge_hf.storage.layout import Block

Recorder: TypeAlias = "Callable[[BlockStatistics], object]"
"""A function that receives the statistics of a block."""

Config = TypeVar("Config", bound=MergeConfig)


class Method(ABC, Generic[Config]):
    """A method that is fitted to the experts and can merge blocks.

    A subclass names its configuration: ``class TIES(Method[TIESConfig], config=TIESConfig)``. `of` finds it by that.

    Args:
        config: the hyper-parameters.
        trimmings: how each expert's task vector is trimmed. The report shows them.

    Attributes:
        sigma: the largest share of a task vector's L1 norm that is trimmed; None if the report is to show no shares.
        by_gram: whether a merged neuron is a linear combination of its rows, whose coefficients follow from their inner
            products. The compiled kernel merges such neurons by `coefficients`, and not by `merge_block`.
    """

    sigma: float | None = None
    by_gram: ClassVar[bool] = False
    _by_config: ClassVar[dict[type[MergeConfig], type[Method[Any]]]] = {}

    def __init_subclass__(cls, config: type[MergeConfig] | None = None) -> None:
        super().__init_subclass__()
        if config:
            Method._by_config[config] = cls

    def __init__(self, config: Config, trimmings: list[Trimming]):
        self.config = config
        self.trimmings = trimmings

    @staticmethod
    def of(config: MergeConfig) -> type[Method[Any]]:
        """Return the method class of a configuration.

        Raises:
            MergeError: if no method class names the configuration's class.
        """
        name = type(config).__name__
        if type(config) not in Method._by_config:
            raise MergeError(
                f"No method is known for {name}: define `class M(Method[{name}], config={name})` beside it."
            )
        return Method._by_config[type(config)]

    @classmethod
    def fit(cls, config: Config, passes: Passes) -> Method[Config]:
        """Return the method, fitted to the whole model; see `fit_method`. The default reads nothing."""
        return cls(config, [Trimming(0.0, 0.0, entries) for entries in passes.work.entries])

    def settings(self) -> dict[str, Any]:
        """Return the hyper-parameters by name, with the values that replaced the names of rules, for the report."""
        return self.config.to_dict()

    @abstractmethod
    def merge_block(self, x: Tensor, unit: Unit, block: Block, record: Recorder) -> Tensor:
        """Merge a block of neurons.

        Args:
            x: (1 + T, neurons, width) float32, the base and the task vectors of the experts that change the unit. It
                may be overwritten.
            unit: the unit that the block belongs to.
            block: the neurons of the unit that `x` holds.
            record: called with the statistics of the block, if the method elects neurons; see `is_elected`.

        Returns:
            (neurons, width) float32. The bits of an entry do not depend on how the unit is divided into blocks.

        Raises:
            FloatingPointError: if an input holds a NaN or an infinity.
        """

    def coefficients(self, gram: Tensor, record: Recorder) -> Tensor:
        """Return the numbers ``a`` with ``merged neuron = w_0 + a @ X``, if the method is `by_gram`.

        Args:
            gram: (neurons, 1 + T, 1 + T) float64, the inner products of each neuron's trimmed rows X.
            record: called with the statistics of the neurons.

        Returns:
            (neurons, 1 + T) float32.
        """
        raise NotImplementedError

    def find_factors(self, unit: Unit, device: torch.device) -> StackedFactors | None:
        """Return the factors of an opened unit, or None if it cannot be merged without forming its task vectors."""
        return None

    def merge_factors(self, base: Tensor, left: Tensor, factors: StackedFactors, record: Recorder) -> Tensor:
        """Merge a block from the factors of its task vectors; see `kernel.merge_low_rank`."""
        raise NotImplementedError

    def find_change(self, matrix: Matrix) -> Factors:
        """Return what is added to a matrix of a linear layer, in factors, if the configuration has `by_matrix`.

        Raises:
            FloatingPointError: if an input holds a NaN or an infinity.
        """
        raise NotImplementedError

    def add_rows(self, base: Tensor, change: Tensor) -> Tensor:
        """Add some rows of a matrix' change to the base; see `add_change`. Both are (rows, columns) float32."""
        return add_change(base, change)


def is_elected(config: MergeConfig) -> bool:
    """Whether a method elects neurons everywhere. The statistics of its merges are then those of the elections."""
    return config.by_neuron and not config.by_matrix


def fit_method(config: Config, passes: Passes) -> Method[Config]:
    """Return the method of a configuration, fitted to the whole model. This reads the inputs if the method needs it.

    Raises:
        MergeError: if a weight is NaN or infinite.
    """
    return Method.of(config).fit(config, passes)


def summed(terms: Iterable[Tensor]) -> Tensor:
    """Add tensors in their order. The last bits of torch's own sums depend on an entry's place in memory."""
    iterator = iter(terms)
    total = next(iterator).clone()
    for term in iterator:
        total += term
    return total


def add_change(base: Tensor, change: Tensor) -> Tensor:
    """Return ``base + change``, and overwrite `change`. Entries whose change is 0 keep the bits of the base.

    Raises:
        FloatingPointError: if the result is not finite.
    """
    unchanged = change == 0
    merged = base.where(unchanged, change.add_(base))
    if not merged.isfinite().all():
        raise FloatingPointError("a weight is NaN or infinite")
    return merged


def thresholds_of(unit: Unit, trimmings: Sequence[Trimming]) -> list[float]:
    """Return the trim thresholds of the experts that change a unit."""
    return [trimmings[expert].threshold for expert in unit.changing]


def weigh_block(x: Tensor, unit: Unit, config: WeightedConfig) -> list[float]:
    """Multiply the task vectors x[1:] of a block by the weights of their experts, in place, and return these."""
    weights = [config.expert_weights(len(unit.task_vectors))[expert] for expert in unit.changing]
    for task_vector, weight in zip(x[1:], weights, strict=True):
        if weight != 1:
            task_vector.mul_(weight)
    return weights


def trim_block(x: Tensor, unit: Unit, thresholds: Sequence[float]) -> None:
    """Trim the task vectors x[1:] of a block in place.

    Args:
        x: (1 + T, neurons, width) float32.
        unit: the unit that the block belongs to.
        thresholds: the trim threshold of each expert, by its number.
    """
    from neuromerge_hf.kernel import trim

    for t, expert in enumerate(unit.changing, start=1):
        if thresholds[expert] > 0:
            trim(x[t], thresholds[expert], out=x[t])
