"""NeuroMerging (Fang et al., arXiv:2503.05320); its mathematics is in `neuromerge_hf.kernel`."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from neuromerge_hf.config import NeuroMergingConfig
from neuromerge_hf.engine.histogram import Trimming
from neuromerge_hf.engine.low_rank import StackedFactors, find_factors
from neuromerge_hf.engine.method import Method, Recorder
from neuromerge_hf.engine.statistics import sum_entries, sum_neurons
from neuromerge_hf.engine.thresholds import find_trimmings
from neuromerge_hf.kernel import Election, merge_elementwise, merge_low_rank, merge_neurons, trim
from neuromerge_hf.methods.length_rule import find_lambda_by_length
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.layout import Block


class NeuroMerging(Method[NeuroMergingConfig]):
    """NeuroMerging with the thresholds and lambdas of a plan.

    Attributes:
        sigma: the largest of the experts' sigmas.
        lambda_orthogonal: the paper's lambda_2, as it came out.

    Args:
        by_length: lambda_2, where the configuration asks for it "by length".
    """

    def __init__(self, config: NeuroMergingConfig, trimmings: list[Trimming], by_length: float | None = None):
        super().__init__(config, trimmings)
        self.sigma = max(trimming.sigma for trimming in trimmings)
        if config.lambda_orthogonal == "auto":
            self.lambda_orthogonal = 1 / (1 - self.sigma)
        elif config.lambda_orthogonal == "length":
            assert by_length is not None, "see `fit`"
            self.lambda_orthogonal = by_length
        else:
            self.lambda_orthogonal = config.lambda_orthogonal
        self._lambdas = config.lambda_parallel, self.lambda_orthogonal
        self._thresholds = [trimming.threshold for trimming in trimmings]

    @classmethod
    def fit(
        cls,
        config: NeuroMergingConfig,
        plan: MergePlan,
        device: torch.device,
        threads: int,
        advance: Callable[[int], object],
    ) -> "NeuroMerging":
        trimmings = find_trimmings(plan, config.density, device, threads, advance)
        if config.lambda_orthogonal != "length":
            return cls(config, trimmings)
        at_one = cls(dataclasses.replace(config, lambda_parallel=1.0, lambda_orthogonal=1.0), trimmings)
        return cls(config, trimmings, find_lambda_by_length(plan, at_one, device, threads, advance))

    def merge_block(self, x: Tensor, unit: Unit, block: Block, record: Recorder) -> Tensor:
        trim_block(x, unit, self._thresholds)
        if unit.is_neuronal:
            return merge_neurons(x.transpose(0, 1), *self._lambdas, lambda election: record(sum_neurons(election)))
        merged = merge_elementwise(x[0, 0], x[1:, 0], self.lambda_orthogonal)
        record(sum_entries(x[:, 0], merged))
        return merged.unsqueeze(0)

    def find_factors(self, unit: Unit, device: torch.device) -> StackedFactors | None:
        return find_factors(unit, self._thresholds, device)

    def merge_factors(self, base: Tensor, left: Tensor, factors: StackedFactors, record: Recorder) -> Tensor:
        def observe(election: Election) -> None:
            record(sum_neurons(election))

        return merge_low_rank(base, left, factors.right, factors.overlap, *self._lambdas, observe)


def trim_block(x: Tensor, unit: Unit, thresholds: list[float]) -> None:
    """Trim the task vectors x[1:] of a block where they are."""
    for t, expert in enumerate(unit.changing, start=1):
        if thresholds[expert] > 0:
            trim(x[t], thresholds[expert], out=x[t])
