"""The work of a callback in any framework: plan, merge, evaluate and publish."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from neuromerge_hf.api import merge_spec, plan_spec
from neuromerge_hf.callbacks.common.announce import announce
from neuromerge_hf.callbacks.common.average import (
    average_alone,
    average_as_expert,
    check_averages_alone,
    length_of,
)
from neuromerge_hf.callbacks.common.checks import check_training, why_not_evaluated
from neuromerge_hf.callbacks.common.command import merge_command
from neuromerge_hf.callbacks.common.lineage import shared_base, warn_of_foreign
from neuromerge_hf.callbacks.common.outcome import Outcome
from neuromerge_hf.callbacks.common.places import Places, check_places, places_of, root_of
from neuromerge_hf.callbacks.common.processes import led_by_first_process, on_first_process
from neuromerge_hf.callbacks.common.publish import check_access, publish
from neuromerge_hf.callbacks.common.rotation import delete_merge
from neuromerge_hf.callbacks.common.settings import AVERAGED, TRAINED, CallbackSettings, When
from neuromerge_hf.callbacks.common.trained_model import (
    adapter_config,
    check_related,
    expert_folder,
    find_base,
    save_outline,
    save_task_config,
)
from neuromerge_hf.callbacks.common.training import Training
from neuromerge_hf.callbacks.common.tune import check_metric, check_tunable, evaluate_together, tune
from neuromerge_hf.callbacks.common.weights import merged_weights, preserved_random_state
from neuromerge_hf.engine.device import find_device
from neuromerge_hf.errors import MergeError, Printable, printable
from neuromerge_hf.folder.directory import work_folder
from neuromerge_hf.folder.recipe import RECIPE_NAME
from neuromerge_hf.methods.average import AverageConfig
from neuromerge_hf.planning.resolve import resolve
from neuromerge_hf.spec import MergeSpec, Runtime
from neuromerge_hf.storage.location import Location

logger = logging.getLogger(__name__)


@dataclass
class MergeRun:
    """The work of a callback.

    Attributes:
        spec: the merge. Its models are the other experts only, and its base may still be unknown.
        runtime: how the merge is run.
        settings: the settings of the callback itself.
        base: the folder or id of the base, at the commit that it had when training started.
        models: the other experts, at their commits.
        failures: the errors of merges that failed during training without stopping it.
        outcomes: the finished merges whose folders are kept, by the step of the trained model.
        steps: the steps of these merges, and of those before a resumed training.
        best_trial: the merge that is kept of a hyper-parameter search.

    Raises:
        MergeError: if the arguments leave nothing to merge, or nothing to tune.
    """

    spec: MergeSpec
    runtime: Runtime
    settings: CallbackSettings
    base: str = ""
    models: tuple[str, ...] = ()
    failures: list[MergeError] = field(default_factory=list)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    steps: set[int] = field(default_factory=set)
    best_trial: Outcome | None = None

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
    def _average_is_expert(self) -> bool:
        """Whether the average of this training's models is merged with other experts."""
        return self.settings.window is not None and bool(self.spec.models)

    @property
    def when(self) -> When:
        """When models are merged."""
        return self.settings.when

    def plan(self, training: Training, others: Sequence["MergeRun"] = ()) -> None:
        """Check everything before training starts. Every process must call this.

        Args:
            training: the training that starts.
            others: the work of other callbacks of the same training.

        Raises:
            MergeError: with all the problems that were found.
        """
        self.failures.clear()
        self.outcomes.clear()
        self.steps = set(training.kept_steps())  # if training is resumed
        if not training.trial:
            self.best_trial = None
        self.models = self.spec.models
        self.base = find_base(training.model, self.spec.base_model, training.folder)
        check_training(training, self.settings)
        check_places(training, self.settings)
        for other in others:
            self._check_apart(training, other)
        for model in (self.base, *self.spec.models):
            if Path(model).expanduser().resolve().is_relative_to(root_of(training).resolve()):
                raise MergeError(f"{model} would be overwritten: this training saves its models there. Move it away.")
        self.base, self.models = on_first_process(partial(self._plan, training))
        announce(f"The base of the merge is {self.base}. The merged model will be in {self._places(training).merged}.")
        if self.settings.tune:
            with preserved_random_state():
                check_metric(training)

    def _check_apart(self, training: Training, other: "MergeRun") -> None:
        """Raise a `MergeError` if another callback of the same training would overwrite what this one writes."""
        ours, theirs = self._places(training), other._places(training)
        both_average = self._average_is_expert and other._average_is_expert
        remedy = "Give one of the two another metric_prefix=, and folders of their own if you name output_dir=."
        if ours.merged == theirs.merged or (both_average and ours.averaged == theirs.averaged):
            place = ours.merged if ours.merged == theirs.merged else ours.averaged
            raise MergeError(f"Two callbacks of this training would write to {place}. {remedy}")
        if self.settings.metric_prefix == other.settings.metric_prefix:
            raise MergeError(
                f"Two callbacks of this training have metric_prefix={other.settings.metric_prefix!r}. {remedy}"
            )

    def _plan(self, training: Training) -> tuple[str, tuple[str, ...]]:
        """Check the merge. Return the base and the experts at their current commits, because branches may move."""
        if self.settings.push_to_hub:
            check_access(self._repo_id(training), self._push_options(training).get("token"))
        if self.runtime.device is not None:  # see `check_settings`
            find_device(self.runtime.device)
        places = self._places(training)
        experts = list(self.models)
        with work_folder(Path(gettempdir())) as temporary:
            outline = temporary / TRAINED
            outline.mkdir()
            is_adapter = adapter_config(training.model) is not None
            if not (training.sharded and is_adapter):  # no process could save it alone
                save_outline(training.model, training.tokenizer, outline)
                experts.insert(0, str(expert_folder(training.model, outline)))
            if not experts:
                return self.base, self.models
            try:
                if self.settings.window and len(experts) > len(self.models):
                    averaged = places.merged if self._averages_alone else places.averaged
                    plan = plan_spec(self._average([Path(experts[0])]), averaged, self._runtime(averaged))
                if not self._averages_alone:
                    if self.spec.base_model is None and len(experts) > len(self.models):
                        resolved = resolve(self._spec(experts), self.runtime.token)
                        self.base = shared_base(resolved, self.base, is_adapter=is_adapter)
                    plan = plan_spec(self._spec(experts), places.merged, self._runtime(places.merged))
                    if len(experts) > len(self.models):
                        warn_of_foreign(plan)
                if not training.sharded:
                    check_related(training.model, plan)
            except MergeError as error:
                named = [problem.replace(str(outline), "the model in training") for problem in error.problems]
                raise MergeError(named) from error
        others = plan.experts[len(plan.experts) - len(self.models) :]
        models = [_at_commit(expert.location, model) for expert, model in zip(others, self.models, strict=True)]
        return _at_commit(plan.base.location, self.base), tuple(models)

    def run_during_training(self, training: Training, saved: Path | None = None) -> None:
        """Do what `run` does, but record a failure instead of raising it. Do nothing if there is no other model yet."""
        if not self.models and on_first_process(lambda: not any(True for _ in training.checkpoints())):
            return
        try:
            self.run(training, saved)
        except MergeError as error:
            logger.error("%s\nThe training goes on.", error)
            self.failures.append(error)
        if self.when == "save":
            self._rotate(training)

    def end(self, training: Training) -> None:
        """Merge if that is to be done when training ends. Every process must call this.

        Raises:
            MergeError: if the merge fails, or a merge failed before.
        """
        if self.when == "train_end":
            self.run(training)
        elif self.when == "save":
            self._rotate(training)  # the end of a training may delete checkpoints, too
            if training.step in self.outcomes:  # the best one, if training ends with it
                self.outcomes[training.step] = self.outcomes.pop(training.step)
        if self.failures:
            raise MergeError([problem for error in self.failures for problem in error.problems])

    def run(self, training: Training, saved: Path | None = None) -> None:
        """Merge the trained model, evaluate the result, and publish it. Every process must call this.

        Args:
            training: the training that gives the model.
            saved: the folder of the model if it is saved already.

        Raises:
            MergeError: if one of these steps fails. The message says where the models are and how to resume.
        """
        places = self._places(training)
        if saved is None:
            training.save(places.trained)
        trained = expert_folder(training.model, saved or places.trained)
        with preserved_random_state():
            merge = partial(self._merge, trained, training, places)
            expert = led_by_first_process(merge, partial(evaluate_together, training, {}))
            metrics = self._evaluate(training, expert, places)
            repo_id = self._repo_id(training) if self.settings.push_to_hub else None
            push_options = self._push_options(training)
            report = on_first_process(partial(publish, places.merged, metrics, repo_id, push_options))
        logged = {
            f"{self._log_name(name)}{metric}": value for name, own in metrics.items() for metric, value in own.items()
        }
        measured = metrics.get("merged", {})
        told = training.metric if training.metric in measured else next(iter(measured), "")
        shown = (f"{self.settings.metric_prefix}_{told}", told)
        self.outcomes[training.step] = outcome = Outcome(places, report, logged, shown)
        self.steps.add(training.step)
        announce(str(outcome))
        if training.trial:
            self._keep_best_trial(training, outcome)

    @property
    def outcome(self) -> Outcome | None:
        """The last merge, or that of the best trial of a search; None if there is none."""
        return self.best_trial or next(reversed(self.outcomes.values()), None)

    def _rotate(self, training: Training) -> None:
        """Delete the merges whose checkpoints are gone."""
        kept = on_first_process(lambda: set(training.kept_steps()))
        for step in self.steps - kept:
            on_first_process(partial(delete_merge, places_of(training, self.settings, step)))
            self.outcomes.pop(step, None)
        self.steps &= kept

    def _keep_best_trial(self, training: Training, outcome: Outcome) -> None:
        """Delete this trial's merge or the best one before, whichever is worse by the metric of the training."""
        metric, best = f"{self.settings.metric_prefix}_{training.metric}", self.best_trial
        if metric not in outcome.metrics or self.when != "train_end":
            return
        if best and best.places == outcome.places:  # of an earlier search
            best = None
        sign = 1 if training.greater_is_better else -1
        is_better = best is None or sign * outcome.metrics[metric] > sign * best.metrics[metric]
        worse = best if is_better else outcome
        self.best_trial = outcome if is_better else best
        if worse:
            on_first_process(partial(delete_merge, worse.places))

    def _merge(self, trained: Path, training: Training, places: Places, call: Callable[[], None]) -> Path:
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
        averaged = places.merged if self._averages_alone else places.averaged
        self._carry_out(self._average(models), averaged, trained)
        if self._averages_alone:
            return trained
        self._merge_experts([averaged], trained, training, places.merged, call)
        return averaged

    def _merge_experts(
        self, own: Sequence[Path], trained: Path, training: Training, target: Path, call: Callable[[], None]
    ) -> None:
        """Merge the experts that this training gives with the others."""
        spec = self._spec([*map(str, own), *self.models])
        if self.settings.tune:
            with self._explained(spec, target, trained):
                tune(training, spec, self._runtime(target), target, self.settings.tune, call)
        else:
            self._carry_out(spec, target, trained)

    def _carry_out(self, spec: MergeSpec, target: Path, trained: Path) -> None:
        with self._explained(spec, target, trained):
            merge_spec(spec, target, self._runtime(target))

    def _explained(self, spec: MergeSpec, target: Path, trained: Path) -> AbstractContextManager[None]:
        command = merge_command(spec, self._runtime(target), target)
        return _errors_explained(f"The trained model is saved in {trained}, but it could not be merged", command)

    def _evaluate(self, training: Training, expert: Path, places: Places) -> dict[str, dict[str, float]]:
        """The metrics of the merged model and of this training's expert, by name; empty if not evaluated."""
        if not self.settings.evaluate or why_not_evaluated(training):
            return {}
        with _errors_explained(f"The merged model is saved in {places.merged}, but it could not be evaluated"):
            own = training.evaluate_trained()
            if not own:
                return {}
            if expert == places.averaged:
                own = self._measured(training, expert, AVERAGED, AVERAGED)
            merged = self._measured(training, places.merged, "merged", expert.name)
        return {"merged": merged, expert.name: own}

    def _measured(self, training: Training, folder: Path, name: str, expert: str) -> dict[str, float]:
        """Evaluate the merge in a folder, with the expert's head if it has one, and log the metrics under `name`."""
        with merged_weights(training.model, folder, expert):
            metrics = training.evaluate()
        training.log({f"{self._log_name(name)}{metric}": value for metric, value in metrics.items()})
        return metrics

    def _log_name(self, name: str) -> str:
        """The beginning of the names under which a model's metrics are logged; the framework logs the trained one's."""
        return {"merged": f"{self.settings.metric_prefix}_", AVERAGED: f"{AVERAGED}_"}.get(name, "")

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

    def _places(self, training: Training) -> Places:
        return places_of(training, self.settings, training.step)

    def _repo_id(self, training: Training) -> str:
        return self.settings.hub_model_id or f"{training.name}-merged"

    def _push_options(self, training: Training) -> dict[str, Any]:
        given = {"token": self.runtime.token, "private": self.settings.private}
        return {**training.push_options, **{name: value for name, value in given.items() if value is not None}}


def _is_merge(target: Path) -> bool:
    """Whether a merge wrote this folder, so that overwriting it loses nothing of the user's."""
    return (target / RECIPE_NAME).is_file()


def _at_commit(location: Location, given: str) -> str:
    return f"{location.id}@{location.commit}" if location.commit else given


@contextmanager
def _errors_explained(situation: str, command: str | None = None) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        again = f"\nThis tries again:\n  {command}" if command else ""
        raise MergeError(Printable(f"{printable(situation)}: {printable(error)}{again}")) from error
