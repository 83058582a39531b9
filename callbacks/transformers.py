"""`NeuroMergeCallback` for the Trainer of transformers, and those that are made from it."""

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from neuromerge_hf.callbacks.base import clear
from neuromerge_hf.callbacks.run import TRAINED, MergingCallback
from neuromerge_hf.errors import MergeError


class NeuroMergeCallback(MergingCallback, TrainerCallback):
    __doc__ = MergingCallback.__doc__
    _steps: Sequence[int] = ()
    _has_ended = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = _calling_trainer()
        handler = trainer.callback_handler
        # Loggers close when training ends, and stand before the user's callbacks.
        handler.callbacks = [self, *(callback for callback in handler.callbacks if callback is not self)]
        self._has_ended = False
        training = _TrainerTraining(trainer, self._steps)
        self._steps = training.steps_on_disk() if state.global_step else []  # else they are of an earlier run
        self._run.plan(training)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps = [*self._steps, state.global_step]
        if self._run.when == "save":
            training = _TrainerTraining(_calling_trainer(), self._steps)
            saved = training.save() if training.sharded else training.checkpoint(state.global_step)
            self._run.run_meanwhile(training, saved)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._run.when == "epoch":
            training = _TrainerTraining(_calling_trainer(), self._steps)
            self._run.run_meanwhile(training, training.save())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        # Said at the end of a training, and not by a trial of a search that is pruned.
        self._has_ended |= "train_runtime" in logs

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._has_ended and self._run.when == "train_end":
            has_best = args.load_best_model_at_end and state.best_model_checkpoint
            training = _TrainerTraining(_calling_trainer(), self._steps, state.best_global_step if has_best else None)
            self._run.run(training, training.save())
        self._run.report_failures()


class _TrainerTraining:
    """What a Trainer trains; see `neuromerge_hf.callbacks.run.Training`."""

    def __init__(self, trainer: Trainer, steps: Sequence[int], step: int | None = None):
        self.trainer = trainer
        self.steps = steps
        self.step = trainer.state.global_step if step is None else step
        self.model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        self.folder = Path(trainer._get_output_dir(getattr(trainer, "_trial", None)))
        self.trial = self.folder.name if trainer.state.is_hyper_param_search else None
        self.name = trainer.args.hub_model_id or Path(trainer.args.output_dir).resolve().name
        self.tokenizer = trainer.processing_class
        self.push_options = {"token": trainer.args.hub_token, "private": trainer.args.hub_private_repo}
        self.sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if not isinstance(self.model, PreTrainedModel | PeftModel):
            raise MergeError(
                f"The model in training is a {type(self.model).__name__}, and no model of transformers or PEFT."
            )

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def steps_on_disk(self) -> list[int]:
        steps = [int(path.rpartition("-")[2]) for path in sort_checkpoints(str(self.folder))]
        return [step for step in steps if step <= self.step]

    def checkpoints(self) -> list[Path]:
        paths = [self.checkpoint(step) for step in self.steps if step != self.step]
        return [path for path in paths if path.is_dir()]

    def save(self) -> Path:
        """Save the model, on every process."""
        folder = self.folder / TRAINED
        trainer = self.trainer
        if trainer.args.should_save:
            clear(folder)
        if trainer.is_fsdp_enabled:  # save_model leaves out what is sharded on the disk as well
            trainer._save(str(folder), state_dict=trainer.accelerator.get_state_dict(trainer.model))
        else:
            trainer.save_model(str(folder), _internal_call=True)
        return folder

    def evaluate(self) -> dict[str, float]:
        trainer = self.trainer
        if trainer.eval_dataset is None:
            return {}
        with _untouched(trainer):
            trainer.state.log_history = []
            trainer.evaluate()
            return _evaluated(trainer.state.log_history)

    def evaluate_trained(self) -> dict[str, float]:
        history = self.trainer.state.log_history
        known = _evaluated(entry for entry in history if entry["step"] == self.step)
        if known:
            return known
        metrics = self.evaluate()
        if metrics:
            self.log(metrics)
        return metrics

    def log(self, metrics: Mapping[str, float]) -> None:
        control = self.trainer.control
        flags = dict(vars(control))
        Trainer.log(self.trainer, dict(metrics))  # TRL's own would add the metrics of the training
        self.trainer.control = control
        vars(control).update(flags)


def _evaluated(entries: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of an evaluation in the log history, one entry for each data set."""
    return {name: value for entry in entries for name, value in entry.items() if name.startswith("eval_")}


@contextmanager
def _untouched(trainer: Trainer) -> Iterator[None]:
    """Whatever evaluating does to the trainer but for its model is undone after the block."""
    handler = trainer.callback_handler
    kept = (trainer.state, trainer.control, trainer.optimizer, handler.callbacks)
    modes = {module: module.training for module in trainer.model.modules()}
    trainer.state, trainer.control = copy.deepcopy(trainer.state), copy.copy(trainer.control)
    handler.callbacks = []
    trainer.optimizer = None  # a schedule-free one changes weights before an evaluation
    try:
        yield
    finally:
        trainer.state, trainer.control, trainer.optimizer, handler.callbacks = kept
        for module, training in modes.items():
            module.training = training


def _calling_trainer() -> Trainer:
    """The trainer whose event this is: events do not name it, but none comes from elsewhere."""
    frame = inspect.currentframe()
    while frame := frame and frame.f_back:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
    raise MergeError("NeuroMergeCallback works in a Trainer of transformers. Pass it as Trainer(..., callbacks=[...]).")
