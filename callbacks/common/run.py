"""The work of a callback in any framework: plan, merge, evaluate and publish."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from neuromerge_hf.api import merge_spec, plan_spec
from neuromerge_hf.callbacks.common.average import (
    AVERAGED,
    average_alone,
    average_as_expert,
    check_averages_alone,
    length_of,
)
from neuromerge_hf.callbacks.common.checks import check_training, why_not_evaluated
from neuromerge_hf.callbacks.common.command import merge_command
from neuromerge_hf.callbacks.common.processes import on_first_process
from neuromerge_hf.callbacks.common.publish import check_access, publish
from neuromerge_hf.callbacks.common.settings import CallbackSettings, When
from neuromerge_hf.callbacks.common.trained_model import (
    adapter_config,
    check_related,
    expert_folder,
    find_base,
    save_outline,
    save_task_config,
)
from neuromerge_hf.callbacks.common.training import TRAINED, Training
from neuromerge_hf.callbacks.common.tune import check_metric, check_tunable, tune
from neuromerge_hf.callbacks.common.weights import merged_weights, preserved_random_state
from neuromerge_hf.engine.device import find_device
from neuromerge_hf.errors import MergeError, Printable, printable
from neuromerge_hf.folder.directory import work_folder
from neuromerge_hf.folder.recipe import RECIPE_NAME
from neuromerge_hf.methods.average import AverageConfig
from neuromerge_hf.spec import MergeSpec, Runtime

logger = logging.getLogger(__name__)


@dataclass
class MergeRun:
    """The work of a callback.

    Attributes:
        spec: the merge. Its models are the other experts only, and its base may still be unknown.
        runtime: how the merge is run.
        settings: the settings of the callback itself.
        base: the folder or id of the model from which training started.
        failures: the errors of merges that failed during training without stopping it.

    Raises:
        MergeError: if the arguments leave nothing to merge, or nothing to tune.
    """

    spec: MergeSpec
    runtime: Runtime
    settings: CallbackSettings
    base: str = ""
    failures: list[MergeError] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_tunable(AverageConfig() if self._averages_alone else self.spec.config, self.settings.tune)
        if self._averages_alone:
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
    def _averages_alone(self) -> bool:
        """Whether the result is the average of this training's models, without other experts."""
        return self.settings.window is not None and not self.spec.models

    @property
    def when(self) -> When:
        """When models are merged."""
        return self.settings.when

    def plan(self, training: Training) -> None:
        """Check everything before training starts. Every process must call this.

        Raises:
            MergeError: with all the problems that were found.
        """
        self.failures.clear()
        self.base = find_base(training.model, self.spec.base_model, training.folder)
        check_training(training, self.settings)
        saved = [(training.folder / name).resolve() for name in (TRAINED, AVERAGED)]
        for model in (self.base, *self.spec.models):
            if any(Path(model).expanduser().resolve().is_relative_to(folder) for folder in saved):
                raise MergeError(f"{model} would be overwritten: this training saves its model there. Move it away.")
        self.base = on_first_process(partial(self._plan, training))
        if self.settings.tune:
            with preserved_random_state():
                check_metric(training)

    def _plan(self, training: Training) -> str:
        """Check the merge. Return the base at its current commit, because the branch may move during training."""
        if self.settings.push_to_hub:
            check_access(self._repo_id(training), self._push_options(training).get("token"))
        if self.runtime.device is not None:  # see `check_settings`
            find_device(self.runtime.device)
        target = self._target(training)
        experts = list(self.spec.models)
        with work_folder(Path(gettempdir())) as temporary:
            outline = temporary / TRAINED
            outline.mkdir()
            if not (training.sharded and adapter_config(training.model)):  # no process could save it alone
                save_outline(training.model, training.tokenizer, outline)
                experts.insert(0, str(expert_folder(training.model, outline)))
            if not experts:
                return self.base
            try:
                if self.settings.window and len(experts) > len(self.spec.models):
                    averaged = target if self._averages_alone else training.folder / AVERAGED
                    plan = plan_spec(self._average([Path(experts[0])]), averaged, self._runtime(averaged))
                if not self._averages_alone:
                    plan = plan_spec(self._spec(experts), target, self._runtime(target))
                if not training.sharded:
                    check_related(training.model, plan)
            except MergeError as error:
                named = [problem.replace(str(outline), "the model in training") for problem in error.problems]
                raise MergeError(named) from error
        base = plan.base.location
        return f"{base.id}@{base.commit}" if base.commit else self.base

    def run_during_training(self, training: Training, trained: Path) -> None:
        """Do what `run` does, but record a failure instead of raising it. Do nothing if there is no other model yet."""
        if not self.spec.models and on_first_process(lambda: not any(True for _ in training.checkpoints())):
            return
        try:
            self.run(training, trained)
        except MergeError as error:
            logger.error("%s\nThe training goes on.", error)
            self.failures.append(error)

    def raise_failures(self) -> None:
        """Raise one `MergeError` with all failures that were recorded during training."""
        if self.failures:
            raise MergeError([problem for error in self.failures for problem in error.problems])

    def run(self, training: Training, trained: Path) -> None:
        """Merge the model that was saved in the folder `trained`, evaluate the result, and publish it.

        Raises:
            MergeError: if one of these steps fails. The message says where the models are and how to resume.
        """
        saved = expert_folder(training.model, trained)
        target = self._target(training)
        with preserved_random_state():
            expert = on_first_process(partial(self._merge, saved, training, target))
            metrics = self._evaluate(training, expert, target)
            repo_id = self._repo_id(training) if self.settings.push_to_hub else None
            on_first_process(partial(publish, target, metrics, repo_id, self._push_options(training)))

    def _merge(self, trained: Path, training: Training, target: Path) -> Path:
        """Merge, and return the folder of the expert that this training gives: the trained model, or the average."""
        checkpoints = self._checkpoints(training)
        if not checkpoints and not self.spec.models:
            raise MergeError(
                f"The trained model is saved in {trained}, but it could not be merged: there is no other expert, and "
                "no checkpoint but the trained model itself."
            )
        if self.settings.window is None:
            self._merge_experts([trained, *checkpoints], trained, training, target)
            return trained
        models = [*checkpoints, trained]
        if len(models) < length_of(self.settings.window):
            logger.warning("%d models are averaged: the training saved no more checkpoints.", len(models))
        for model in models:
            save_task_config(training.model, model)
        averaged = target if self._averages_alone else training.folder / AVERAGED
        self._carry_out(self._average(models), averaged, trained)
        if self._averages_alone:
            return trained
        self._merge_experts([averaged], trained, training, target)
        return averaged

    def _merge_experts(self, own: Sequence[Path], trained: Path, training: Training, target: Path) -> None:
        """Merge the experts that this training gives with the others."""
        spec = self._spec([*map(str, own), *self.spec.models])
        if self.settings.tune:
            with self._explained(spec, target, trained):
                tune(training, spec, self._runtime(target), target, self.settings.tune)
        else:
            self._carry_out(spec, target, trained)

    def _carry_out(self, spec: MergeSpec, target: Path, trained: Path) -> None:
        with self._explained(spec, target, trained):
            merge_spec(spec, target, self._runtime(target))

    def _explained(self, spec: MergeSpec, target: Path, trained: Path) -> AbstractContextManager[None]:
        command = merge_command(spec, self._runtime(target), target)
        return _errors_explained(f"The trained model is saved in {trained}, but it could not be merged", command)

    def _evaluate(self, training: Training, expert: Path, target: Path) -> dict[str, dict[str, float]]:
        """The metrics of the merged model and of this training's expert, by name; empty if not evaluated."""
        if not self.settings.evaluate or why_not_evaluated(training):
            return {}
        with _errors_explained(f"The merged model is saved in {target}, but it could not be evaluated"):
            own = training.evaluate_trained()
            if not own:
                return {}
            if expert == training.folder / AVERAGED:
                own = self._measured(training, expert, AVERAGED, AVERAGED)
            merged = self._measured(training, target, "merged", expert.name)
        return {"merged": merged, expert.name: own}

    def _measured(self, training: Training, folder: Path, name: str, expert: str) -> dict[str, float]:
        """Evaluate the merge in a folder, with the expert's head if it has one, and log the metrics under `name`."""
        with merged_weights(training.model, folder, expert):
            metrics = training.evaluate()
        training.log({f"{name}_{metric}": value for metric, value in metrics.items()})
        return metrics

    def _checkpoints(self, training: Training) -> list[Path]:
        """The folders of the checkpoints that are merged or averaged with the trained model, oldest first."""
        if self.settings.window is not None:
            count: int | None = length_of(self.settings.window) - 1
        else:
            count = None if self.settings.checkpoints == "all" else self.settings.checkpoints or 0
        return list(islice(training.checkpoints(), count))[::-1]

    def _average(self, models: Sequence[Path]) -> MergeSpec:
        assert self.settings.window is not None
        average = average_alone if self._averages_alone else average_as_expert
        return average(replace(self.spec, base_model=self.base), models, self.settings.window)

    def _spec(self, experts: Sequence[str]) -> MergeSpec:
        return replace(self.spec, models=tuple(experts), base_model=self.base)

    def _runtime(self, target: Path) -> Runtime:
        return replace(self.runtime, overwrite=_is_merge(target))

    def _target(self, training: Training) -> Path:
        target = Path(self.settings.output_dir or training.folder / "merged").expanduser().absolute()
        if self.settings.output_dir and training.trial:
            target /= training.trial
        return target if self.when == "train_end" else target / f"step-{training.step}"

    def _repo_id(self, training: Training) -> str:
        return self.settings.hub_model_id or f"{training.name}-merged"

    def _push_options(self, training: Training) -> dict[str, Any]:
        given = {"token": self.runtime.token} if self.runtime.token is not None else {}
        return {**training.push_options, **given}


def _is_merge(target: Path) -> bool:
    """Whether a merge wrote this folder, so that overwriting it loses nothing of the user's."""
    return (target / RECIPE_NAME).is_file()


@contextmanager
def _errors_explained(situation: str, command: str | None = None) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        again = f"\nThis tries again:\n  {command}" if command else ""
        raise MergeError(Printable(f"{printable(situation)}: {printable(error)}{again}")) from error
