"""`NeuroMergeCallback` for the Trainer of Lightning, from `lightning` or `pytorch_lightning`."""

import logging
from typing import TYPE_CHECKING, Any

from neuromerge_hf.callbacks.common.callback import MergingCallback
from neuromerge_hf.callbacks.common.settings import NOT_TAKEN, CallbackOptions, CallbackSettings
from neuromerge_hf.callbacks.lightning_package import Callback
from neuromerge_hf.callbacks.lightning_trainer import CheckpointFiles, LightningTraining
from neuromerge_hf.errors import MergeError
from neuromerge_hf.options import with_options
from neuromerge_hf.spec import MergeSpec, Models, Runtime

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)


class NeuroMergeCallback(MergingCallback, Callback):
    """Merges the model of a LightningModule when training ends, as `neuromerge_hf.NeuroMergeCallback` does.

    The models are saved in ``trained`` and ``merged`` in ``<trainer.default_root_dir>/_neuromerge``. The module's
    validation loop evaluates both. The merged model's metrics are logged as ``merged_...``; they are also in
    ``trainer.callback_metrics``.

    Examples:
        >>> callback = NeuroMergeCallback(["math"], base_model="base")
        >>> trainer = Trainer(max_steps=1, callbacks=[callback])
        >>> trainer.fit(module, texts)
        >>> type(AutoMergedModel.from_pretrained(callback.merged_dir)).__name__
        'LlamaForCausalLM'
    """

    @with_options(CallbackSettings, MergeSpec, Runtime, without=NOT_TAKEN)
    def __init__(
        self,
        models: Models = (),
        *,
        attribute: str | None = None,
        best_weights: bool = False,
        **options: "Unpack[CallbackOptions]",
    ):
        """Check the arguments.

        Args:
            models: the other experts, as in `neuromerge_hf.merge`. It may be empty with `checkpoints` or
                `average_checkpoints`.
            attribute: the path of the model in the LightningModule ("model", "net.encoder"), if it has several models.
            best_weights: merge the best weights of the `ModelCheckpoint`, not the last ones.
            base_model: the model that all were fine-tuned from. Default: what the trained model was loaded from,
                or the base of that if its card and those of the experts name it. transformers notes no revision: pass
                ``id@revision`` if it was loaded at one.
            **options: the fields of `CallbackSettings`, `MergeSpec` and `Runtime`.

        Raises:
            MergeError: if an argument is wrong.
        """
        super().__init__(models, **options)
        self._attribute = attribute
        self._best_weights = best_weights
        self._saved_step: int | None = None
        self._files = CheckpointFiles()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._files = CheckpointFiles()
        training = self._training(trainer)
        if self._best_weights and not getattr(trainer.checkpoint_callback, "monitor", None):
            raise MergeError("best_weights=True needs a ModelCheckpoint(monitor=...) that tells what is best.")
        self._plan(training, trainer.callbacks)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        self._saved_step = trainer.global_step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._merge_saved(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._run.when == "epoch":
            self._run.run_during_training(self._training(trainer))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._merge_saved(trainer)
        best = trainer.checkpoint_callback.best_model_path if self._best_weights else None
        if best == "":
            logger.warning("The ModelCheckpoint has saved nothing: the last weights are merged, not the best.")
        self._run.end(self._training(trainer, best))

    def _merge_saved(self, trainer: Any) -> None:
        """Merge if a checkpoint was saved since the last step. During the save, a validation may be running."""
        if self._saved_step is not None:
            self._files.note(trainer.checkpoint_callbacks, self._saved_step)
        if self._run.when == "save" and self._saved_step == trainer.global_step:
            self._run.run_during_training(self._training(trainer))
        self._saved_step = None

    def _training(self, trainer: Any, best: str | None = None) -> LightningTraining:
        return LightningTraining(trainer, self._attribute, self._files, best)
