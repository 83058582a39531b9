"""The interface of training in any framework, as the callbacks use it."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from neuromerge_hf.callbacks.common.weights import HuggingFaceModel


class Training(Protocol):
    """Training in progress. Each framework implements this. Every process calls the methods, except `checkpoints`."""

    model: HuggingFaceModel
    """The model in training, without its wrappers."""
    tokenizer: Any
    """A tokenizer, or another processor with `save_pretrained`; None if there is none."""
    name: str
    """The name from which the name of the merged model's repository is made, if the user gives none."""
    folder: Path
    """The folder in which training saves checkpoints."""
    written: Sequence[Path]
    """The folders to which training writes, `folder` among them. No other model can take their place."""
    trial: str | None
    """The name of this trial in a hyper-parameter search; None outside a search."""
    step: int
    """The number of optimizer steps that the model was trained for."""
    sharded: bool
    """Whether each process has only a part of the weights."""
    saves: bool
    """Whether training saves checkpoints."""
    keeps_checkpoints: bool
    """Whether training saves checkpoints that can be merged."""
    kept: int | None
    """How many checkpoints training keeps at most; None if it keeps all."""
    evaluates: bool
    """Whether there are data to evaluate a model on."""
    metric: str
    """The name of the metric that tells which model is best."""
    greater_is_better: bool
    """Whether the largest value of `metric` is the best."""
    not_evaluated: str | None
    """A sentence that says why the merged model cannot be evaluated in this training; None if it can."""
    push_options: dict[str, Any]
    """The arguments of `push` that follow from the framework's own arguments."""

    def pushes(self, folder: Path) -> bool:
        """Return whether training itself would upload a folder to the Hub."""

    def save(self, folder: Path) -> None:
        """Save the model. Every process must call this."""

    def kept_steps(self) -> Iterable[int]:
        """Return the steps of this training's checkpoints that are still there. One process calls this."""

    def checkpoints(self) -> Iterable[Path]:
        """Return the folders of the checkpoints, newest first, without the trained model. One process calls this."""

    def evaluate(self) -> dict[str, float]:
        """Return the metrics of the model with its current weights. The state of the trainer does not change."""

    def evaluate_trained(self) -> dict[str, float]:
        """Return the metrics of the trained model; an empty dictionary if there are no data to evaluate it on."""

    def log(self, metrics: Mapping[str, float]) -> None:
        """Send metrics to every logger."""
