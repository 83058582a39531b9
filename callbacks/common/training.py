"""What the callbacks know of a training, whatever its framework."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from neuromerge_hf.callbacks.common.weights import HuggingFaceModel

TRAINED = "trained"
"""The folder of the trained model, by which the report and the card name it."""


class Training(Protocol):
    """A training that goes on, as the adapter of its framework shows it. All of it is for every process."""

    model: HuggingFaceModel
    """The model in training, out of its wrappers."""
    tokenizer: Any
    """Or another processor with `save_pretrained`; None if there is none."""
    name: str
    """After which the merged model's repository is named, if the user does not name it."""
    folder: Path
    """Where checkpoints are written."""
    trial: str | None
    """Which of several trainings of a search this is."""
    step: int
    sharded: bool
    """Whether each process has but a part of the weights."""
    saves: bool
    """Whether it saves checkpoints."""
    keeps_checkpoints: bool
    """Whether it saves checkpoints that can be merged."""
    evaluates: bool
    """Whether there is anything to evaluate a model on."""
    metric: str
    """By which this training tells what is best."""
    greater_is_better: bool
    not_evaluated: str | None
    """Why the merged model cannot be evaluated in this training, although it could in others; a sentence."""
    push_options: dict[str, Any]
    """What the framework's own arguments say of the Hub."""

    def checkpoints(self) -> Iterable[Path]:
        """The experts that the checkpoints of the run are, newest first, without the trained model; on one process."""

    def evaluate(self) -> dict[str, float]:
        """The metrics of the model as it is now, by the framework's evaluation; the trainer's state stays as it is."""

    def evaluate_trained(self) -> dict[str, float]:
        """The metrics of the trained model; none if there is nothing to evaluate it on."""

    def log(self, metrics: Mapping[str, float]) -> None:
        """Give metrics to every logger."""
