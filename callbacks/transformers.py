"""`NeuroMergeCallback` for the Trainer of transformers and its subclasses."""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback, TrainerState

from neuromerge_hf.callbacks.common.callback import MergingCallback
from neuromerge_hf.callbacks.common.settings import NOT_TAKEN, CallbackOptions, CallbackSettings
from neuromerge_hf.callbacks.transformers_trainer import TrainerTraining
from neuromerge_hf.errors import MergeError
from neuromerge_hf.options import with_options
from neuromerge_hf.spec import MergeSpec, Models, Runtime

if TYPE_CHECKING:
    from typing_extensions import Unpack


class NeuroMergeCallback(MergingCallback, TrainerCallback):
    __doc__ = MergingCallback.__doc__
    _steps: Sequence[int] = ()
    _has_ended = False

    @with_options(CallbackSettings, MergeSpec, Runtime, without=NOT_TAKEN)
    def __init__(self, models: Models = (), *, trainer: Trainer | None = None, **options: "Unpack[CallbackOptions]"):
        """Check the arguments.

        Args:
            models: the other experts, as in `neuromerge_hf.merge`. It may be empty with `checkpoints` or
                `average_checkpoints`.
            trainer: the Trainer that the callback is added to. Without this argument, the callback looks for it in the
                call stack, because events do not name their trainer.
            base_model: the model that all were fine-tuned from. Default: what the trained model was loaded from,
                or the base of that if its card and those of the experts name it. transformers notes no revision: pass
                ``id@revision`` if it was loaded at one.
            **options: the fields of `CallbackSettings`, `MergeSpec` and `Runtime`.

        Raises:
            MergeError: if an argument is wrong.
        """
        super().__init__(models, **options)
        if not isinstance(trainer, Trainer | None):
            raise MergeError(f"trainer must be a Trainer of transformers, not {trainer!r:.100}.")
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._find_trainer(state)
        handler = trainer.callback_handler
        # Loggers come before the user's callbacks and close when training ends. This callback must log before that.
        handler.callbacks = [self, *(callback for callback in handler.callbacks if callback is not self)]
        self._has_ended = False
        training = TrainerTraining(trainer, [])
        if state.global_step:  # otherwise the checkpoints belong to an earlier run
            training.steps = training.steps_on_disk()
        self._steps = training.steps
        self._plan(training, handler.callbacks)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps = [*self._steps, state.global_step]
        if self._run.when == "save":
            training = TrainerTraining(self._find_trainer(state), self._steps)
            saved = training.checkpoint(state.global_step) if training.saves_itself else None
            self._run.run_during_training(training, saved)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._run.when == "epoch":
            self._run.run_during_training(TrainerTraining(self._find_trainer(state), self._steps))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        # The Trainer logs this when training ends, but not when a search prunes a trial.
        self._has_ended |= "train_runtime" in logs

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._has_ended:
            best = state.best_global_step if args.load_best_model_at_end and state.best_model_checkpoint else None
            self._run.end(TrainerTraining(self._find_trainer(state), self._steps, best))

    def _find_trainer(self, state: TrainerState) -> Trainer:
        """Find the trainer that sent the event.

        Raises:
            MergeError: if another trainer sent it than the one that the callback was given, or none.
        """
        trainer = self._trainer or _calling_trainer()
        if trainer.state is not state:
            raise MergeError(
                "trainer= is not the Trainer that NeuroMergeCallback was added to. Pass that one, or leave it out."
            )
        return trainer


def _calling_trainer() -> Trainer:
    """Find the trainer in the call stack of an event. Events do not name it, but only trainers send them."""
    frame = inspect.currentframe()
    while frame := frame and frame.f_back:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
    raise MergeError("NeuroMergeCallback works in a Trainer of transformers. Pass it as Trainer(..., callbacks=[...]).")
