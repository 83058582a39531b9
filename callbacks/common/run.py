"""What both callbacks do, whatever the framework: plan, merge, evaluate, publish."""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from neuromerge_hf.api import merge
from neuromerge_hf.callbacks.common.command import merge_command
from neuromerge_hf.callbacks.common.processes import is_distributed, on_first_process
from neuromerge_hf.callbacks.common.publish import check_access, publish
from neuromerge_hf.callbacks.common.trained_model import (
    adapter_config,
    check_related,
    expert_folder,
    find_base,
    save_outline,
)
from neuromerge_hf.callbacks.common.training import TRAINED, Training
from neuromerge_hf.callbacks.common.tune import check_metric, check_tunable, tune
from neuromerge_hf.callbacks.common.weights import merged_weights, network_of, untouched_randomness
from neuromerge_hf.config import MergeConfig
from neuromerge_hf.engine.device import find_device
from neuromerge_hf.engine.writer import check_shard_size
from neuromerge_hf.errors import MergeError
from neuromerge_hf.folder.recipe import RECIPE_NAME
from neuromerge_hf.planning.planner import plan_merge
from neuromerge_hf.planning.resolve import ModelId
from neuromerge_hf.tuning.search import TuningGrid

logger = logging.getLogger(__name__)

OWN_OPTIONS = ("models", "output_dir", "base_model", "config", "overwrite")
"""The arguments of `merge` that are not passed through."""


@dataclass
class MergeRun:
    """The arguments of a callback (see `neuromerge_hf.NeuroMergeCallback`), and what it does.

    Attributes:
        base: what the training started from.
        failures: why models were not merged during the training, which went on.
    """

    models: Sequence[ModelId]
    base_model: ModelId | None
    config: MergeConfig
    when: Literal["train_end", "save", "epoch"]
    output_dir: str | Path | None
    evaluate: bool
    push_to_hub: bool
    hub_model_id: str | None
    checkpoints: Literal["all"] | int | None
    tune: bool | TuningGrid
    options: dict[str, Any]
    base: str = ""
    failures: list[MergeError] = field(default_factory=list)

    def __post_init__(self) -> None:
        if isinstance(self.models, str | Path):
            raise MergeError(f"models must be a list of fine-tunes or adapters, not {self.models!r}.")
        if not isinstance(self.config, MergeConfig):
            raise MergeError(f"config must be a NeuroMergingConfig, or that of another method, not {self.config!r}.")
        check_tunable(self.config, self.tune)
        if self.when not in ("train_end", "save", "epoch"):
            raise MergeError(f'when must be "train_end", "save" or "epoch", not {self.when!r}.')
        is_count = isinstance(self.checkpoints, int) and not isinstance(self.checkpoints, bool) and self.checkpoints > 0
        if self.checkpoints not in (None, "all") and not is_count:
            raise MergeError(f'checkpoints must be "all" or how many of the last ones, not {self.checkpoints!r}.')
        if not self.models and self.checkpoints is None:
            raise MergeError(
                "There is nothing to merge the trained model with. Name other experts of its base, or pass "
                'checkpoints="all" to merge it with the checkpoints of its own training.'
            )
        for name in self.options:
            if name in OWN_OPTIONS or name not in inspect.signature(merge).parameters:
                raise TypeError(f"NeuroMergeCallback has no argument {name!r}, and neither has neuromerge_hf.merge.")

    def plan(self, training: Training) -> None:
        """Find what is wrong before the training goes on. On every process.

        Raises:
            MergeError: with all the problems that were found.
        """
        self.failures.clear()
        self.base = find_base(training.model, self.base_model, training.folder)
        if self.checkpoints and not training.keeps_checkpoints:
            raise MergeError("This training saves no checkpoints that can be merged. Let it, or leave checkpoints out.")
        if self.when == "save" and not training.saves:
            raise MergeError('This training saves no checkpoints to be merged. Let it, or merge when="epoch".')
        saved = (training.folder / TRAINED).resolve()
        for model in (self.base, *self.models):
            if Path(model).expanduser().resolve().is_relative_to(saved):
                raise MergeError(f"{model} would be overwritten: this training saves its model there. Move it away.")
        if self.tune and (reason := _why_not_tuned(training)):
            raise MergeError(f"The lambdas cannot be tuned. {reason}")
        if self.evaluate and (reason := _why_not_evaluated(training)):
            logger.warning("The merged model will not be evaluated. %s Pass evaluate=False if you know.", reason)
        self.base = on_first_process(partial(self._plan, training))
        if self.tune:
            with untouched_randomness():
                check_metric(training)

    def _plan(self, training: Training) -> str:
        """Returns the base at its present commit, since the training may outlast that."""
        if self.push_to_hub:
            check_access(self._repo_id(training), self._push_options(training).get("token"))
        if device := self.options.get("device"):
            find_device(device)
        check_shard_size(self.options.get("max_shard_size", "5GB"))
        target = self._target(training)
        experts: list[ModelId] = list(self.models)
        with TemporaryDirectory() as temporary:
            outline = Path(temporary, TRAINED)
            outline.mkdir()
            if not (training.sharded and adapter_config(training.model)):  # which no process could save alone
                save_outline(training.model, training.tokenizer, outline)
                experts.insert(0, expert_folder(training.model, outline))
            if not experts:
                return self.base
            try:
                plan = plan_merge(
                    experts,
                    base_model=self.base,
                    config=self.config,
                    output_dir=target,
                    overwrite=_is_merge(target),
                    **_understood(self.options, plan_merge),
                )
                if not training.sharded:
                    check_related(training.model, plan)
            except MergeError as error:
                named = [problem.replace(str(outline), "the model in training") for problem in error.problems]
                raise MergeError(named) from error
        base = plan.base.location
        return f"{base.id}@{base.commit}" if base.commit else self.base

    def run_meanwhile(self, training: Training, trained: Path) -> None:
        """As `run`, in the middle of a training, which a failure does not stop. Without other models, nothing yet."""
        if not self.models and on_first_process(lambda: not any(True for _ in training.checkpoints())):
            return
        try:
            self.run(training, trained)
        except MergeError as error:
            logger.error("%s\nThe training goes on.", error)
            self.failures.append(error)

    def report_failures(self) -> None:
        """Raise what failed in the middle of the training."""
        if self.failures:
            raise MergeError([problem for error in self.failures for problem in error.problems])

    def run(self, training: Training, trained: Path) -> None:
        """Merge the model that was saved in the folder `trained`, evaluate the result, and publish it.

        Raises:
            MergeError: if one of that fails. It says where the models are and how to go on.
        """
        expert = expert_folder(training.model, trained)
        target = self._target(training)
        with untouched_randomness():
            on_first_process(partial(self._merge, expert, training, target))
            metrics = self._evaluate(training, expert.name, target)
            repo_id = self._repo_id(training) if self.push_to_hub else None
            on_first_process(partial(publish, target, metrics, repo_id, self._push_options(training)))

    def _merge(self, expert: Path, training: Training, target: Path) -> None:
        experts = [expert, *self._checkpoints(training), *self.models]
        overwrite = _is_merge(target)
        command = merge_command(experts, self.base, target, self.config, {**self.options, "overwrite": overwrite})
        with _explained(f"The trained model is saved in {expert}, but it could not be merged", command):
            if len(experts) == 1:
                raise MergeError("There is no other expert, and no checkpoint but the trained model itself.")
            settings = {"base_model": self.base, "config": self.config, "overwrite": overwrite, **self.options}
            if self.tune:
                plan = plan_merge(experts, **_understood(settings, plan_merge))
                head_of = plan.experts[0].name if plan.experts[0].head else None
                grid = self.tune if isinstance(self.tune, TuningGrid) else None
                tune(training, experts, target, grid=grid, head_of=head_of, **settings)
            else:
                merge(experts, target, **settings)

    def _evaluate(self, training: Training, expert: str, target: Path) -> dict[str, dict[str, float]]:
        """Metrics by the name of the model."""
        if not self.evaluate or _why_not_evaluated(training):
            return {}
        with _explained(f"The merged model is saved in {target}, but it could not be evaluated"):
            trained = training.evaluate_trained()
            if not trained:
                return {}
            with merged_weights(training.model, target, expert):
                merged = training.evaluate()
            training.log({f"merged_{name}": value for name, value in merged.items()})
        return {"merged": merged, expert: trained}

    def _checkpoints(self, training: Training) -> list[Path]:
        count = None if self.checkpoints == "all" else self.checkpoints or 0
        return list(islice(training.checkpoints(), count))[::-1]

    def _target(self, training: Training) -> Path:
        target = Path(self.output_dir or training.folder / "merged").expanduser().absolute()
        if self.output_dir and training.trial:
            target /= training.trial
        return target if self.when == "train_end" else target / f"step-{training.step}"

    def _repo_id(self, training: Training) -> str:
        return self.hub_model_id or f"{training.name}-merged"

    def _push_options(self, training: Training) -> dict[str, Any]:
        given = {"token": self.options["token"]} if "token" in self.options else {}
        return {**training.push_options, **given}


def _why_not_evaluated(training: Training) -> str | None:
    if training.sharded:
        return "Each process holds a part of the model in training, whose place it would take."
    if getattr(network_of(training.model), "hf_quantizer", None):
        return "The model in training, whose place it would take, is quantised."
    return training.not_evaluated


def _why_not_tuned(training: Training) -> str | None:
    if is_distributed():
        return "Several processes train the model, and candidates are evaluated by one."
    if not training.evaluates:
        return "There is nothing to evaluate a candidate on."
    return _why_not_evaluated(training)


def _understood(options: Mapping[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """Those options that a function has an argument for."""
    return {name: value for name, value in options.items() if name in inspect.signature(function).parameters}


def _is_merge(target: Path) -> bool:
    """Whether a merge wrote this folder, so that it can be made again and nothing of the user's is lost."""
    return (target / RECIPE_NAME).is_file()


@contextmanager
def _explained(what_there_is: str, command: str | None = None) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        again = f"\nThis tries again:\n  {command}" if command else ""
        raise MergeError(f"{what_there_is}: {error}{again}") from error
