"""The work of a callback in any framework: plan, merge, evaluate and publish."""

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from neuromerge_hf.callbacks.common.announce import announce
from neuromerge_hf.callbacks.common.checks import check_training, why_not_evaluated
from neuromerge_hf.callbacks.common.merging import Merging, errors_explained
from neuromerge_hf.callbacks.common.outcome import Outcome
from neuromerge_hf.callbacks.common.places import Places, check_places, places_of, root_of
from neuromerge_hf.callbacks.common.preparation import prepare
from neuromerge_hf.callbacks.common.processes import led_by_first_process, on_first_process
from neuromerge_hf.callbacks.common.publish import check_access, publish
from neuromerge_hf.callbacks.common.rotation import delete_merge
from neuromerge_hf.callbacks.common.settings import AVERAGED, CallbackSettings, When
from neuromerge_hf.callbacks.common.trained_model import expert_folder, find_base
from neuromerge_hf.callbacks.common.training import Training
from neuromerge_hf.callbacks.common.tune import check_metric, evaluate_together
from neuromerge_hf.callbacks.common.weights import merged_weights, preserved_random_state
from neuromerge_hf.errors import MergeError

logger = logging.getLogger(__name__)


@dataclass
class MergeRun:
    """The work of a callback during one training after another.

    Attributes:
        merging: what is merged, and how.
        failures: the errors of merges that failed during training without stopping it.
        outcomes: the finished merges whose folders are kept, by the step of the trained model.
        steps: the steps of these merges, and of those before a resumed training.
        best_trial: the merge that is kept of a hyper-parameter search.
    """

    merging: Merging
    failures: list[MergeError] = field(default_factory=list)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    steps: set[int] = field(default_factory=set)
    best_trial: Outcome | None = None

    @property
    def settings(self) -> CallbackSettings:
        """The settings of the callback itself."""
        return self.merging.settings

    @property
    def when(self) -> When:
        """When models are merged."""
        return self.settings.when

    @property
    def outcome(self) -> Outcome | None:
        """The last merge, or that of the best trial of a search; None if there is none."""
        return self.best_trial or next(reversed(self.outcomes.values()), None)

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
        self.steps = on_first_process(lambda: set(training.kept_steps()))  # if training is resumed
        if not training.trial:
            self.best_trial = None
        spec = self.merging.spec
        base = find_base(training.model, spec.base_model, training.folder)
        check_training(training, self.settings)
        check_places(training, self.settings)
        for other in others:
            self._check_apart(training, other)
        for model in (base, *spec.models):
            if Path(os.path.expanduser(model)).resolve().is_relative_to(root_of(training).resolve()):
                raise MergeError(f"{model} would be overwritten: this training saves its models there. Move it away.")
        if self.settings.push_to_hub:
            check = partial(check_access, self._repo_id(training), self._push_options(training).get("token"))
            on_first_process(check)
        merging, places = replace(self.merging, base=base, models=spec.models), self._places(training)
        self.merging = on_first_process(partial(prepare, merging, training, places))
        announce(f"The base of the merge is {self.merging.base}. The merged model will be in {places.merged}.")
        if self.settings.tune:
            with preserved_random_state():
                check_metric(training)

    def _check_apart(self, training: Training, other: "MergeRun") -> None:
        """Raise a `MergeError` if another callback of the same training would overwrite what this one writes."""
        ours, theirs = self._places(training), other._places(training)
        both_average = self.merging.average_is_expert and other.merging.average_is_expert
        remedy = "Give one of the two another metric_prefix=, and folders of their own if you name output_dir=."
        if ours.merged == theirs.merged or (both_average and ours.averaged == theirs.averaged):
            place = ours.merged if ours.merged == theirs.merged else ours.averaged
            raise MergeError(f"Two callbacks of this training would write to {place}. {remedy}")
        both_push = self.settings.push_to_hub and other.settings.push_to_hub
        if both_push and self._repo_id(training) == other._repo_id(training):
            raise MergeError(
                f"Two callbacks of this training would push to {self._repo_id(training)}. Give each a hub_model_id=."
            )
        if self.settings.metric_prefix == other.settings.metric_prefix:
            raise MergeError(
                f"Two callbacks of this training have metric_prefix={other.settings.metric_prefix!r}. {remedy}"
            )

    def run_during_training(self, training: Training, saved: Path | None = None) -> None:
        """Do what `run` does, but record a failure instead of raising it. Do nothing if there is no other model yet."""
        if not self.merging.models and on_first_process(lambda: not any(True for _ in training.checkpoints())):
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
            merge = partial(self.merging.merge, trained, training, places)
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

    def _rotate(self, training: Training) -> None:
        """Delete the merges whose checkpoints are gone."""

        def delete() -> set[int]:
            gone = self.steps - set(training.kept_steps())
            for step in gone:
                delete_merge(places_of(training, self.settings, step))
            return gone

        for step in on_first_process(delete):
            self.steps.remove(step)
            self.outcomes.pop(step, None)

    def _keep_best_trial(self, training: Training, outcome: Outcome) -> None:
        """Delete this trial's merge or the best one before, whichever is worse by the metric of the training."""
        metric, best = f"{self.settings.metric_prefix}_{training.metric}", self.best_trial
        if not math.isfinite(outcome.metrics.get(metric, math.nan)) or self.when != "train_end":
            return
        if best and best.places == outcome.places:  # of an earlier search
            best = None
        sign = 1 if training.greater_is_better else -1
        is_better = best is None or sign * outcome.metrics[metric] > sign * best.metrics[metric]
        worse = best if is_better else outcome
        self.best_trial = outcome if is_better else best
        if worse:
            on_first_process(partial(delete_merge, worse.places))

    def _evaluate(self, training: Training, expert: Path, places: Places) -> dict[str, dict[str, float]]:
        """The metrics of the merged model and of this training's expert, by name; empty if not evaluated."""
        if not self.settings.evaluate or why_not_evaluated(training):
            return {}
        with errors_explained(f"The merged model is saved in {places.merged}, but it could not be evaluated"):
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

    def _places(self, training: Training) -> Places:
        return places_of(training, self.settings, training.step)

    def _repo_id(self, training: Training) -> str:
        return self.settings.hub_model_id or f"{training.name}-merged"

    def _push_options(self, training: Training) -> dict[str, Any]:
        given = {"token": self.merging.runtime.token, "private": self.settings.private}
        return {**training.push_options, **{name: value for name, value in given.items() if value is not None}}
