"""The work of a callback in any framework: plan, merge, evaluate and publish."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from neuromerge_hf.api import merge_spec, plan_spec
from neuromerge_hf.callbacks.common.command import merge_command
from neuromerge_hf.callbacks.common.processes import is_distributed, on_first_process
from neuromerge_hf.callbacks.common.publish import check_access, publish
from neuromerge_hf.callbacks.common.settings import CallbackSettings, When
from neuromerge_hf.callbacks.common.trained_model import (
    adapter_config,
    check_related,
    expert_folder,
    find_base,
    save_outline,
)
from neuromerge_hf.callbacks.common.training import TRAINED, Training
from neuromerge_hf.callbacks.common.tune import check_metric, check_tunable, tune
from neuromerge_hf.callbacks.common.weights import merged_weights, network_of, preserved_random_state
from neuromerge_hf.engine.device import find_device
from neuromerge_hf.errors import MergeError
from neuromerge_hf.folder.recipe import RECIPE_NAME
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
        check_tunable(self.spec.config, self.settings.tune)
        if not self.spec.models and self.settings.checkpoints is None:
            raise MergeError(
                "There is nothing to merge the trained model with. Name other experts of its base, or pass "
                'checkpoints="all" to merge it with the checkpoints of its own training.'
            )

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
        if self.settings.checkpoints and not training.keeps_checkpoints:
            raise MergeError("This training saves no checkpoints that can be merged. Let it, or leave checkpoints out.")
        if self.when == "save" and not training.saves:
            raise MergeError('This training saves no checkpoints to be merged. Let it, or merge when="epoch".')
        saved = (training.folder / TRAINED).resolve()
        for model in (self.base, *self.spec.models):
            if Path(model).expanduser().resolve().is_relative_to(saved):
                raise MergeError(f"{model} would be overwritten: this training saves its model there. Move it away.")
        if self.settings.tune and (reason := _why_not_tuned(training)):
            raise MergeError(f"The lambdas cannot be tuned. {reason}")
        if self.settings.evaluate and (reason := _why_not_evaluated(training)):
            logger.warning("The merged model will not be evaluated. %s Pass evaluate=False if you know.", reason)
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
        with TemporaryDirectory() as temporary:
            outline = Path(temporary, TRAINED)
            outline.mkdir()
            if not (training.sharded and adapter_config(training.model)):  # no process could save it alone
                save_outline(training.model, training.tokenizer, outline)
                experts.insert(0, str(expert_folder(training.model, outline)))
            if not experts:
                return self.base
            try:
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
        expert = expert_folder(training.model, trained)
        target = self._target(training)
        with preserved_random_state():
            on_first_process(partial(self._merge, expert, training, target))
            metrics = self._evaluate(training, expert.name, target)
            repo_id = self._repo_id(training) if self.settings.push_to_hub else None
            on_first_process(partial(publish, target, metrics, repo_id, self._push_options(training)))

    def _merge(self, expert: Path, training: Training, target: Path) -> None:
        experts = [*map(str, [expert, *self._checkpoints(training)]), *self.spec.models]
        spec, runtime = self._spec(experts), self._runtime(target)
        command = merge_command(spec, runtime, target)
        with _errors_explained(f"The trained model is saved in {expert}, but it could not be merged", command):
            if len(experts) == 1:
                raise MergeError("There is no other expert, and no checkpoint but the trained model itself.")
            if self.settings.tune:
                tune(training, spec, runtime, target, self.settings.tune)
            else:
                merge_spec(spec, target, runtime)

    def _evaluate(self, training: Training, expert: str, target: Path) -> dict[str, dict[str, float]]:
        """The metrics of the merged and of the trained model, by the model's name; empty if not evaluated."""
        if not self.settings.evaluate or _why_not_evaluated(training):
            return {}
        with _errors_explained(f"The merged model is saved in {target}, but it could not be evaluated"):
            trained = training.evaluate_trained()
            if not trained:
                return {}
            with merged_weights(training.model, target, expert):
                merged = training.evaluate()
            training.log({f"merged_{name}": value for name, value in merged.items()})
        return {"merged": merged, expert: trained}

    def _checkpoints(self, training: Training) -> list[Path]:
        count = None if self.settings.checkpoints == "all" else self.settings.checkpoints or 0
        return list(islice(training.checkpoints(), count))[::-1]

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


def _why_not_evaluated(training: Training) -> str | None:
    if training.sharded:
        return "The merged weights would have to replace those of the model in training, which are sharded."
    if getattr(network_of(training.model), "hf_quantizer", None):
        return "The merged weights would have to replace those of the model in training, which are quantised."
    return training.not_evaluated


def _why_not_tuned(training: Training) -> str | None:
    if is_distributed():
        return "Several processes train the model, and candidates are evaluated by one."
    if not training.evaluates:
        return "There is nothing to evaluate a candidate on."
    return _why_not_evaluated(training)


def _is_merge(target: Path) -> bool:
    """Whether a merge wrote this folder, so that overwriting it loses nothing of the user's."""
    return (target / RECIPE_NAME).is_file()


@contextmanager
def _errors_explained(situation: str, command: str | None = None) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        again = f"\nThis tries again:\n  {command}" if command else ""
        raise MergeError(f"{situation}: {error}{again}") from error
