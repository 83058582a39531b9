"""`NeuroMergeCallback` for the Trainer of transformers, and those that are made from it."""

import inspect
from collections.abc import Sequence
from typing import Any

from transformers import Trainer, TrainerCallback

from neuromerge_hf.callbacks.common.callback import MergingCallback
from neuromerge_hf.callbacks.transformers_trainer import TrainerTraining
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
        training = TrainerTraining(trainer, self._steps)
        self._steps = training.steps_on_disk() if state.global_step else []  # else they are of an earlier run
        self._run.plan(training)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps = [*self._steps, state.global_step]
        if self._run.when == "save":
            training = TrainerTraining(_calling_trainer(), self._steps)
            saved = training.checkpoint(state.global_step) if training.saves_itself else training.save()
            self._run.run_meanwhile(training, saved)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._run.when == "epoch":
            training = TrainerTraining(_calling_trainer(), self._steps)
            self._run.run_meanwhile(training, training.save())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        # Said at the end of a training, and not by a trial of a search that is pruned.
        self._has_ended |= "train_runtime" in logs

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._has_ended and self._run.when == "train_end":
            has_best = args.load_best_model_at_end and state.best_model_checkpoint
            training = TrainerTraining(_calling_trainer(), self._steps, state.best_global_step if has_best else None)
            self._run.run(training, training.save())
        self._run.report_failures()


def _calling_trainer() -> Trainer:
    """The trainer whose event this is: events do not name it, but none comes from elsewhere."""
    frame = inspect.currentframe()
    while frame := frame and frame.f_back:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
    raise MergeError("NeuroMergeCallback works in a Trainer of transformers. Pass it as Trainer(..., callbacks=[...]).")
