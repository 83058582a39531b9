"""The merge of a trained model with other experts, or with models of its own training."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from neuromerge_hf.api import merge_spec
from neuromerge_hf.callbacks.common.average import (
    average_alone,
    average_as_expert,
    check_averages_alone,
    length_of,
)
from neuromerge_hf.callbacks.common.command import merge_command
from neuromerge_hf.callbacks.common.parking import WeightsLostError
from neuromerge_hf.callbacks.common.places import Places
from neuromerge_hf.callbacks.common.settings import CallbackSettings
from neuromerge_hf.callbacks.common.trained_model import save_task_config
from neuromerge_hf.callbacks.common.training import Training
from neuromerge_hf.callbacks.common.tune import check_tunable, tune
from neuromerge_hf.errors import MergeError, Printable, printable
from neuromerge_hf.folder.recipe import RECIPE_NAME
from neuromerge_hf.methods.average import AverageConfig
from neuromerge_hf.spec import MergeSpec, Runtime

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Merging:
    """What a callback merges, and how.

    Attributes:
        spec: the merge that the user asked for. Its models are the other experts only, and its base may be unknown.
        runtime: how the merge is run.
        settings: the settings of the callback itself.
        base: the folder or id of the base, at the commit that it had when training started.
        models: the other experts, at their commits.

    Raises:
        MergeError: if the arguments leave nothing to merge, or nothing to tune.
    """

    spec: MergeSpec
    runtime: Runtime
    settings: CallbackSettings
    base: str = ""
    models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_tunable(AverageConfig() if self.averages_alone else self.spec.config, self.settings.tune)
        if self.averages_alone:
            check_averages_alone(self.spec)
        elif not self.spec.models and self.settings.checkpoints is None:
            raise MergeError(
                "There is nothing to merge the trained model with. Name other experts of its base, or pass "
                'checkpoints="all" to merge it with the checkpoints of its own training, or average_checkpoints=3 to '
                "average it with the last two."
            )
        if self.settings.checkpoints is not None and getattr(self.spec.config, "weights", None):
            raise MergeError(
                "The weights of an average need a fixed number of experts, which checkpoints= does not give. Average "
                "the checkpoints with average_checkpoints=(...), their weights, instead."
            )

    @property
    def averages_alone(self) -> bool:
        """Whether the result is the average of this training's models, without other experts."""
        return self.settings.window is not None and not self.spec.models

    @property
    def average_is_expert(self) -> bool:
        """Whether the average of this training's models is merged with other experts."""
        return self.settings.window is not None and bool(self.spec.models)

    def merge(self, trained: Path, training: Training, places: Places, call: Callable[[], None]) -> Path:
        """Merge, and return the folder of the expert that this training gives: the trained model, or the average."""
        checkpoints = self._checkpoints(training)
        if not checkpoints and not self.models:
            raise MergeError(
                f"The trained model is saved in {trained}, but it could not be merged: there is no other expert, and "
                "no checkpoint but the trained model itself."
            )
        if self.settings.window is None:
            self._merge_experts([trained, *checkpoints], trained, training, places.merged, call)
            return trained
        models = [*checkpoints, trained]
        if len(models) < length_of(self.settings.window):
            logger.warning("%d models are averaged: the training saved no more checkpoints.", len(models))
        for model in models:
            save_task_config(training.model, model)
        averaged = places.merged if self.averages_alone else places.averaged
        self._carry_out(self.average_of(models), averaged, trained)
        if self.averages_alone:
            return trained
        self._merge_experts([averaged], trained, training, places.merged, call)
        return averaged

    def _merge_experts(
        self, own: Sequence[Path], trained: Path, training: Training, target: Path, call: Callable[[], None]
    ) -> None:
        """Merge the experts that this training gives with the others."""
        spec = self.spec_of([*map(str, own), *self.models])
        if self.settings.tune:
            with self._explained(spec, target, trained):
                tune(training, spec, self.runtime_for(target), target, self.settings.tune, call)
        else:
            self._carry_out(spec, target, trained)

    def _carry_out(self, spec: MergeSpec, target: Path, trained: Path) -> None:
        with self._explained(spec, target, trained):
            merge_spec(spec, target, self.runtime_for(target))

    def _explained(self, spec: MergeSpec, target: Path, trained: Path) -> AbstractContextManager[None]:
        command = merge_command(spec, self.runtime_for(target), target)
        return errors_explained(f"The trained model is saved in {trained}, but it could not be merged", command)

    def _checkpoints(self, training: Training) -> list[Path]:
        """The folders of the checkpoints that are merged or averaged with the trained model, oldest first."""
        if self.settings.window is not None:
            count: int | None = length_of(self.settings.window) - 1
        else:
            count = None if self.settings.checkpoints == "all" else self.settings.checkpoints or 0
        return list(islice(training.checkpoints(), count))[::-1]

    def average_of(self, models: Sequence[Path]) -> MergeSpec:
        assert self.settings.window is not None
        average = average_alone if self.averages_alone else average_as_expert
        return average(replace(self.spec, base_model=self.base), models, self.settings.window)

    def spec_of(self, experts: Sequence[str]) -> MergeSpec:
        """The spec of a merge of some experts, the last of which are the `models`."""
        own = experts[: len(experts) - len(self.models)]
        names = (*(Path(expert).name for expert in own), *self.spec.names) if self.spec.names else None
        return replace(self.spec, models=tuple(experts), names=names, base_model=self.base)

    def runtime_for(self, target: Path) -> Runtime:
        return replace(self.runtime, overwrite=_is_merge(target))


def _is_merge(target: Path) -> bool:
    """Whether a merge wrote this folder, so that overwriting it loses nothing of the user's."""
    return (target / RECIPE_NAME).is_file()


@contextmanager
def errors_explained(situation: str, command: str | None = None) -> Iterator[None]:
    try:
        yield
    except WeightsLostError:
        raise
    except Exception as error:
        again = f"\nThis tries again:\n  {command}" if command else ""
        raise MergeError(Printable(f"{printable(situation)}: {printable(error)}{again}")) from error
