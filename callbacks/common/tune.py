"""Tuning the lambdas of a merge by the training's own evaluation."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from neuromerge_hf.callbacks.common.publish import TASK
from neuromerge_hf.callbacks.common.training import Training
from neuromerge_hf.callbacks.common.weights import class_of, network_of, other_weights
from neuromerge_hf.errors import MergeError
from neuromerge_hf.methods.neuromerging import NeuroMergingConfig
from neuromerge_hf.planning.planner import plan_with_weights
from neuromerge_hf.planning.preflight import check_settings
from neuromerge_hf.planning.resolve import resolve
from neuromerge_hf.spec import MergeSpec, Runtime
from neuromerge_hf.tuning.search import TuningGrid
from neuromerge_hf.tuning.tune import tune_plan


def tune(
    training: Training,
    spec: MergeSpec,
    runtime: Runtime,
    target: Path,
    tuned: bool | TuningGrid,
    call: Callable[[], None],
) -> None:
    """Merge with the lambdas for which the training's evaluation gives the merged model the best metric.

    If the trained model, the first expert of `spec`, has a head of its own, candidates are evaluated with that head.
    The first process calls this. Before each evaluation it calls the others, to do `evaluate_together` as well.

    Raises:
        MergeError: if a candidate's metric is not finite, or the trained model cannot hold the merged weights.
    """

    def evaluate(candidate: Any) -> float:
        call()
        return evaluate_together(training, candidate.state_dict())[training.metric]

    spec = replace(spec, tuned_on=spec.tuned_on or TASK)
    problems = check_settings(spec, runtime, target)
    plan = plan_with_weights(spec, runtime, resolve(spec, runtime.access, problems), target)
    trained = plan.experts[0]
    tune_plan(
        plan,
        runtime,
        {trained.name: evaluate} if trained.head else evaluate,
        grid=tuned if isinstance(tuned, TuningGrid) else TuningGrid(),
        greater_is_better=training.greater_is_better,
        target=target,
        auto_class=None if trained.head else class_of(network_of(training.model)),
    )


def evaluate_together(training: Training, weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Evaluate weights in the model in training. Every process must call this; the first one's weights are used."""
    with other_weights(training.model, weights, training.folder):
        return training.evaluate()


def check_metric(training: Training) -> None:
    """Evaluate once, and raise a `MergeError` if that does not give the metric by which the lambdas are tuned."""
    metrics = training.evaluate()
    if training.metric not in metrics:
        raise MergeError(
            f"The lambdas are tuned by {training.metric}, which the evaluation does not give; it gives "
            f"{', '.join(metrics)}. Name another with metric_for_best_model in the TrainingArguments, or in "
            "Lightning with ModelCheckpoint(monitor=...)."
        )


def check_tunable(config: object, tuned: bool | TuningGrid) -> None:
    """Raise a `MergeError` if tuning is asked for and the method has no lambdas."""
    if tuned and type(config) is not NeuroMergingConfig:  # a subclass is another method
        raise MergeError(f"tune chooses the lambdas of NeuroMerging, which {type(config).__name__} has not.")
