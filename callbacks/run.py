"""What both callbacks do, whatever the framework: plan, merge, evaluate, publish."""

import inspect
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol

from transformers import PreTrainedTokenizerBase

from neuromerge_hf.callbacks.base import adapter_config, check_related, expert_folder, find_base, save_outline
from neuromerge_hf.callbacks.processes import on_first_process
from neuromerge_hf.callbacks.publish import check_access, publish
from neuromerge_hf.callbacks.weights import HuggingFaceModel, merged_weights, untouched_randomness
from neuromerge_hf.config import NeuroMergingConfig
from neuromerge_hf.errors import MergeError
from neuromerge_hf.merging import merge
from neuromerge_hf.models import ModelId
from neuromerge_hf.planner import plan_merge
from neuromerge_hf.recipe import RECIPE_NAME

logger = logging.getLogger(__name__)

TRAINED = "trained"
"""The folder of the trained model, by which the report and the card name it."""

OWN_OPTIONS = ("models", "output_dir", "base_model", "config", "overwrite")
"""The arguments of `merge` that are not passed through."""


class Training(Protocol):
    """A training that goes on, as the adapter of its framework shows it. All of it is for every process."""

    model: HuggingFaceModel
    """The model in training, out of its wrappers."""
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    """After which the merged model's repository is named, if the user does not name it."""
    folder: Path
    """Where checkpoints are written."""
    trial: str | None
    """Which of several trainings of a search this is."""
    step: int
    sharded: bool
    """Whether each process has but a part of the weights."""
    push_options: dict[str, Any]
    """What the framework's own arguments say of the Hub."""

    def checkpoints(self) -> Sequence[Path]:
        """The run's checkpoints but for the trained model itself, oldest first."""

    def evaluate(self) -> dict[str, float]:
        """The metrics of the model as it is now, by the framework's evaluation; the trainer's state stays as it is."""

    def evaluate_trained(self) -> dict[str, float]:
        """The metrics of the trained model; none if there is nothing to evaluate it on."""

    def log(self, metrics: Mapping[str, float]) -> None:
        """Give metrics to every logger."""


@dataclass
class MergeRun:
    """The arguments of a callback (see `neuromerge_hf.NeuroMergeCallback`), and what it does.

    Attributes:
        base: what the training started from.
        failures: why models were not merged during the training, which went on.
    """

    models: Sequence[ModelId]
    base_model: ModelId | None
    config: NeuroMergingConfig
    when: Literal["train_end", "save", "epoch"]
    output_dir: str | Path | None
    evaluate: bool
    push_to_hub: bool
    hub_model_id: str | None
    checkpoints: Literal["all"] | int | None
    options: dict[str, Any]
    base: str = ""
    failures: list[MergeError] = field(default_factory=list)

    def __post_init__(self) -> None:
        if isinstance(self.models, str | Path):
            raise MergeError(f"models must be a list of fine-tunes or adapters, not {self.models!r}.")
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
        if self.evaluate and training.sharded:
            logger.warning(
                "The merged model will not be evaluated, because each process holds a part of the model in training "
                "alone. Evaluate it afterwards, or pass evaluate=False."
            )
        on_first_process(partial(self._plan, training))

    def _plan(self, training: Training) -> None:
        understood = inspect.signature(plan_merge).parameters
        target = self._target(training)
        with TemporaryDirectory() as temporary:
            outline = Path(temporary, TRAINED)
            outline.mkdir()
            experts: list[ModelId] = list(self.models)
            if not (training.sharded and adapter_config(training.model)):  # no process could save such an adapter
                save_outline(training.model, training.tokenizer, outline)
                experts.insert(0, expert_folder(training.model, outline))
            if not experts:
                return
            try:
                plan = plan_merge(
                    experts,
                    base_model=self.base,
                    config=self.config,
                    output_dir=target,
                    overwrite=_is_merge(target),
                    **{name: value for name, value in self.options.items() if name in understood},
                )
                if not training.sharded:
                    check_related(training.model, plan)
            except MergeError as error:
                named = [problem.replace(str(outline), "the model in training") for problem in error.problems]
                raise MergeError(named) from error
        if self.push_to_hub:
            check_access(self._repo_id(training), self._push_options(training).get("token"))

    def run_meanwhile(self, training: Training, trained: Path) -> None:
        """As `run`, in the middle of a training, which a failure does not stop."""
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
        experts = [expert, *self._last(training.checkpoints()), *self.models]
        overwrite = _is_merge(target)
        command = self._command(experts, target, overwrite)
        with _explained(f"The trained model is saved in {expert}, but it could not be merged", command):
            if len(experts) == 1:
                raise MergeError(
                    "there is no other expert, and no checkpoint of this training but the trained model itself. Save "
                    "more often (save_steps)."
                )
            merge(experts, target, base_model=self.base, config=self.config, overwrite=overwrite, **self.options)

    def _evaluate(self, training: Training, expert: str, target: Path) -> dict[str, dict[str, float]]:
        """Metrics by the name of the model."""
        if not self.evaluate or training.sharded:
            return {}
        with _explained(f"The merged model is saved in {target}, but it could not be evaluated"):
            trained = training.evaluate_trained()
            if not trained:
                return {}
            with merged_weights(training.model, target, expert):
                merged = training.evaluate()
            training.log({f"merged_{name}": value for name, value in merged.items()})
        return {"merged": merged, expert: trained}

    def _last(self, checkpoints: Sequence[Path]) -> Sequence[Path]:
        if self.checkpoints is None:
            return []
        return checkpoints if self.checkpoints == "all" else checkpoints[-self.checkpoints :]

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

    def _command(self, experts: Sequence[ModelId], target: Path, overwrite: bool) -> str:
        """What does the same merge on the command line; without tokens, which are no one's business."""
        words = ["neuromerge", "merge", *map(str, experts), "--base-model", self.base, "--output", str(target)]
        default = NeuroMergingConfig()
        settings = {name: value for name, value in asdict(self.config).items() if value != getattr(default, name)}
        settings |= {**self.options, "overwrite": overwrite}
        for name, value in settings.items():
            option = "--" + name.replace("_", "-")
            if name == "token" or value is None or value is False:
                continue
            elif value is True:
                words.append(option)
            else:
                for part in value if isinstance(value, list | tuple) else [value]:
                    words += [option, str(part).removeprefix("torch.")]
        return shlex.join(words)


class MergingCallback:
    """Merges the model that was trained with other experts of its base, when the training ends.

    Before the training everything is checked that can be, so that a wrong expert stops a run in its first second. At
    its end the trained model is saved in ``<args.output_dir>/trained``, then merged, evaluated, and pushed if asked.
    The trainer and its model stay as they are.

    Args:
        models: the other experts, as in `neuromerge_hf.merge`. May be empty with `checkpoints`.
        base_model: what all were fine-tuned from. Default: what the trained model was loaded from.
        config: the hyper-parameters of the merge.
        when: "train_end"; or "save", for each checkpoint, or "epoch", for the model after each epoch, which go to
            ``step-N`` in `output_dir`. A failure before the end does not stop the training, but is raised after it.
        output_dir: where the merged model goes; ``<args.output_dir>/merged``. An earlier merge there is replaced.
        evaluate: measure the merged model, with the trained model's own head, on the trainer's `eval_dataset`: its
            ``merged_eval_*`` stand beside ``eval_*`` in the log history, in every logger and in the card. The trained
            model is evaluated as well if it was not when training ended.
        push_to_hub: push the merged model with its card.
        hub_model_id: where to; ``<args.hub_model_id>-merged``, or named after `args.output_dir`.
        checkpoints: merge checkpoints of the training itself as well: "all", or how many of the last ones.
        **options: what else `neuromerge_hf.merge` takes: ``dtype``, ``tokenizer``, ``device``, ``token``, ...

    Raises:
        MergeError: before the training if something is wrong with the models or the settings; after it if the merge
            failed. Then it says where the trained model is, and gives the command that tries again.
    """

    def __init__(
        self,
        models: Sequence[ModelId] = (),
        base_model: ModelId | None = None,
        config: NeuroMergingConfig | None = None,
        when: Literal["train_end", "save", "epoch"] = "train_end",
        output_dir: str | Path | None = None,
        evaluate: bool = True,
        push_to_hub: bool = False,
        hub_model_id: str | None = None,
        checkpoints: Literal["all"] | int | None = None,
        **options: Any,
    ):
        self._run = MergeRun(
            models,
            base_model,
            config or NeuroMergingConfig(),
            when,
            output_dir,
            evaluate,
            push_to_hub,
            hub_model_id,
            checkpoints,
            options,
        )


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
