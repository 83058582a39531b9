"""The lambdas of a merge, chosen by the evaluation of the training itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neuromerge_hf.callbacks.common.publish import TASK
from neuromerge_hf.callbacks.common.training import Training
from neuromerge_hf.callbacks.common.weights import class_of, network_of, other_weights
from neuromerge_hf.config import NeuroMergingConfig
from neuromerge_hf.errors import MergeError
from neuromerge_hf.planning.resolve import ModelId
from neuromerge_hf.tuning.search import TuningGrid
from neuromerge_hf.tuning.tune import tune_lambdas


def tune(
    training: Training,
    experts: Sequence[ModelId],
    target: Path,
    *,
    grid: TuningGrid | None,
    head_of: str | None,
    **options: Any,
) -> None:
    """Merge with the lambdas with which the merged model, in the place of the trained one, is evaluated best.

    Args:
        experts: the trained model, saved, and the others.
        head_of: the name of the trained model if it has a head of its own, under which candidates are evaluated then.
        **options: what else `tune_lambdas` takes.

    Raises:
        MergeError: if a candidate's metric is not finite, or the trained model cannot hold the merged weights.
    """

    def evaluate(candidate: Any) -> float:
        with other_weights(training.model, candidate.state_dict()):
            return training.evaluate()[training.metric]

    tune_lambdas(
        experts,
        {head_of: evaluate} if head_of else evaluate,
        grid=grid,
        greater_is_better=training.greater_is_better,
        output_dir=target,
        auto_class=None if head_of else class_of(network_of(training.model)),
        **{"tuned_on": TASK, **options},
    )


def check_metric(training: Training) -> None:
    """Raise a `MergeError` if the evaluation, run for once, does not give what the lambdas are to be chosen by."""
    metrics = training.evaluate()
    if training.metric not in metrics:
        raise MergeError(
            f"The lambdas are tuned by {training.metric}, which the evaluation does not give; it gives "
            f"{', '.join(metrics)}. Name another with metric_for_best_model in the TrainingArguments, or in "
            "Lightning with ModelCheckpoint(monitor=...)."
        )


def check_tunable(config: object, tuned: bool | TuningGrid) -> None:
    """Raise a `MergeError` if a method has no lambdas, or what is to be tried is none."""
    if not isinstance(tuned, bool | TuningGrid):
        raise MergeError(f"tune must be True, False or a TuningGrid, not {tuned!r}.")
    if tuned and not isinstance(config, NeuroMergingConfig):
        raise MergeError(f"tune chooses the lambdas of NeuroMerging, which {type(config).__name__} has not.")
