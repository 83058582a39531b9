"""Checks before training that its model can be merged, evaluated and tuned."""

import logging

from neuromerge_hf.callbacks.common.average import length_of
from neuromerge_hf.callbacks.common.settings import CallbackSettings
from neuromerge_hf.callbacks.common.training import Training
from neuromerge_hf.callbacks.common.weights import network_of
from neuromerge_hf.errors import MergeError

logger = logging.getLogger(__name__)


def check_training(training: Training, settings: CallbackSettings) -> None:
    """Raise a `MergeError` if this training cannot end as the settings say. Warn if it cannot be evaluated."""
    _check_checkpoints(training, settings)
    if settings.when == "save" and not training.saves:
        raise MergeError('This training saves no checkpoints to be merged. Let it, or merge when="epoch".')
    if settings.tune and (reason := _why_not_tuned(training)):
        raise MergeError(f"The lambdas cannot be tuned. {reason}")
    if settings.evaluate and (reason := why_not_evaluated(training)):
        logger.warning("The merged model will not be evaluated. %s Pass evaluate=False if you know.", reason)


def _check_checkpoints(training: Training, settings: CallbackSettings) -> None:
    window = settings.window
    if (settings.checkpoints or window) and not training.keeps_checkpoints:
        name = "average_checkpoints" if window else "checkpoints"
        raise MergeError(f"This training saves no checkpoints that can be merged. Let it, or leave {name} out.")
    if window and training.kept is not None and training.kept < length_of(window):
        raise MergeError(
            f"average_checkpoints averages the last {length_of(window)} models, and this training keeps "
            f"{training.kept} of its checkpoints. Let it keep more (save_total_limit; in Lightning, save_top_k)."
        )


def why_not_evaluated(training: Training) -> str | None:
    """Return why a merged model cannot be evaluated in this training; None if it can."""
    if training.sharded:
        return "The merged weights would have to replace those of the model in training, which are sharded."
    if getattr(network_of(training.model), "hf_quantizer", None):
        return "The merged weights would have to replace those of the model in training, which are quantised."
    return training.not_evaluated


def _why_not_tuned(training: Training) -> str | None:
    if not training.evaluates:
        return "There is nothing to evaluate a candidate on."
    return why_not_evaluated(training)
