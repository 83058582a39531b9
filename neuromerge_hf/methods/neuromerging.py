"""NeuroMerging (Fang et al., arXiv:2503.05320). `neuromerge_hf.kernel` has the mathematics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from neuromerge_hf.config import MergeConfig, check_density, check_number, is_number
from neuromerge_hf.engine.method import Method, Recorder, trim_block
from neuromerge_hf.errors import MergeError
from neuromerge_hf.options import option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from neuromerge_hf.engine.low_rank import StackedFactors
    from neuromerge_hf.engine.passes import Passes
    from neuromerge_hf.engine.trimming import Trimming
    from neuromerge_hf.kernel import Election
    from neuromerge_hf.sources.unit import Unit
    from neuromerge_hf.storage.layout import Block

CITATION = """\
@inproceedings{fang2025neuromerging,
  title     = {To See a World in a Spark of Neuron: Disentangling Multi-task Interference for Training-free Model Merging},
  author    = {Fang, Zitao and Du, Guodong and Yu, Shuyang and Guo, Yifei and Zhang, Yiwei and Cao, Yiyao and Li, Jing and
               Tang, Ho-Kin and Goh, Sim Kuan},
  booktitle = {Proceedings of the 2025 Conference on Empirical Methods in Natural Language Processing},
  year      = {2025},
  url       = {https://arxiv.org/abs/2503.05320}
}"""  # noqa: E501, cards show it as it stands


@dataclass(frozen=True)
class NeuroMergingConfig(MergeConfig):
    """The hyper-parameters of NeuroMerging (Fang et al., arXiv:2503.05320).

    Args:
        density: the fraction of each task vector's entries that is kept, 0 < density <= 1. Trimming keeps the largest
            magnitudes of the whole model.
        lambda_parallel: the paper's lambda_1, the weight of the merged parallel part.
        lambda_orthogonal: the paper's lambda_2, the weight of the merged orthogonal part and of the parameters that
            are not neuronal. "auto" is the paper's choice without validation data, 1 / (1 - sigma), where sigma is the
            largest share of a task vector's L1 norm that was trimmed. "length" is a rule of this library that needs
            one more pass over the weights: the merged task vector becomes 1.4 times as long as the experts' task
            vectors are on average, or shorter if the experts agree (see `methods.length_rule`).
        exclude: names of parameters to copy from the base, as shell patterns (``*``, ``?``, ``[...]``).

    Raises:
        MergeError: if a value is out of range.

    Examples:
        >>> merge(["math"], "merged", base_model="base", config=NeuroMergingConfig(density=0.5)).density
        0.5
    """

    method = "neuromerging"
    title = "NeuroMerging"
    paper = "https://arxiv.org/abs/2503.05320"
    summary = """\
NeuroMerging (Fang et al., EMNLP 2025) takes what each fine-tune changed in the base, its task vector, and keeps the
largest entries of it. A neuron's change is then split into a part parallel to the neuron's old weights and a part
orthogonal to them, and in each part a sign is elected where the fine-tunes disagree."""
    citation: ClassVar[str | None] = CITATION
    own_rules: ClassVar[Mapping[str, str]] = {"lambda_orthogonal": "length"}
    by_neuron = True
    bytes_per_entry = 0

    density: float = option(0.2, "the fraction of each task vector that is kept")
    lambda_parallel: float = option(0.0, "the weight of the parallel part, lambda_1", shown="0")
    lambda_orthogonal: float | Literal["auto", "length"] = option(
        "auto", "the weight of the orthogonal part, lambda_2: a number, auto (the paper's), length (ours)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self.density)
        check_number("lambda_parallel", self.lambda_parallel)
        if self.lambda_orthogonal not in ("auto", "length") and not is_number(self.lambda_orthogonal):
            raise MergeError(
                f'lambda_orthogonal must be "auto", "length" or a finite number, not {self.lambda_orthogonal!r}.'
            )

    @property
    def passes(self) -> int:
        return 1 + (self.density < 1) + (self.lambda_orthogonal == "length")

    @property
    def finds_thresholds(self) -> bool:
        return self.density < 1


class NeuroMerging(Method[NeuroMergingConfig], config=NeuroMergingConfig):
    """NeuroMerging with the thresholds of the experts and the lambdas.

    Attributes:
        sigma: the largest of the experts' sigmas.
        lambda_orthogonal: the paper's lambda_2, as a number.

    Args:
        by_length: lambda_2 if the configuration's lambda_orthogonal is "length".
    """

    sigma: float
    by_gram = True

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
    def fit(cls, config: NeuroMergingConfig, passes: Passes) -> NeuroMerging:
        from neuromerge_hf.engine.thresholds import find_trimmings
        from neuromerge_hf.methods.length_rule import find_lambda_by_length

        trimmings = find_trimmings(passes, config.density)
        if config.lambda_orthogonal != "length":
            return cls(config, trimmings)
        at_one = cls(dataclasses.replace(config, lambda_parallel=1.0, lambda_orthogonal=1.0), trimmings)
        return cls(config, trimmings, find_lambda_by_length(passes, at_one))

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "lambda_orthogonal": self.lambda_orthogonal}

    def merge_block(self, x: Tensor, unit: Unit, block: Block, record: Recorder) -> Tensor:
        from neuromerge_hf.engine.block_statistics import sum_entries, sum_neurons
        from neuromerge_hf.kernel import merge_elementwise, merge_neurons

        trim_block(x, unit, self._thresholds)
        if unit.is_neuronal:
            return merge_neurons(x.transpose(0, 1), *self._lambdas, lambda election: record(sum_neurons(election)))
        merged = merge_elementwise(x[0, 0], x[1:, 0], self.lambda_orthogonal)
        record(sum_entries(x[:, 0], merged))
        return merged.unsqueeze(0)

    def coefficients(self, gram: Tensor, record: Recorder) -> Tensor:
        from neuromerge_hf.engine.block_statistics import sum_neurons
        from neuromerge_hf.kernel import hold_election

        election = hold_election(gram, *self._lambdas)
        record(sum_neurons(election))
        return election.coefficients.float()

    def find_factors(self, unit: Unit, device: torch.device) -> StackedFactors | None:
        from neuromerge_hf.engine.low_rank import find_factors

        return find_factors(unit, self._thresholds, device)

    def merge_factors(self, base: Tensor, left: Tensor, factors: StackedFactors, record: Recorder) -> Tensor:
        from neuromerge_hf.engine.block_statistics import sum_neurons
        from neuromerge_hf.kernel import merge_low_rank

        def observe(election: Election) -> None:
            record(sum_neurons(election))

        return merge_low_rank(base, left, factors.right, factors.overlap, *self._lambdas, observe)
