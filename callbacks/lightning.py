"""`NeuroMergeCallback` for the Trainer of Lightning: of `lightning` and of `pytorch_lightning`."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from neuromerge_hf.callbacks.common.callback import MergingCallback
from neuromerge_hf.callbacks.lightning_package import Callback
from neuromerge_hf.callbacks.lightning_trainer import LightningTraining
from neuromerge_hf.config import MergeConfig
from neuromerge_hf.errors import MergeError
from neuromerge_hf.planning.resolve import ModelId
from neuromerge_hf.tuning.search import TuningGrid

logger = logging.getLogger(__name__)


class NeuroMergeCallback(MergingCallback, Callback):
    """As `neuromerge_hf.NeuroMergeCallback`, with its arguments, for the model that a LightningModule trains.

    ``<trainer.default_root_dir>`` is where ``trained`` and ``merged`` go. Both models are evaluated by the module's
    validation loop; its metrics are logged as ``merged_...``.

    Args:
        attribute: where the model is in the LightningModule ("model", "net.encoder"), if it has several.
        best_weights: merge the best weights of the `ModelCheckpoint`, not the last ones.
    """

    _saved_step: int | None = None

    def __init__(
        self,
        models: Sequence[ModelId] = (),
        base_model: ModelId | None = None,
        config: MergeConfig | None = None,
        when: Literal["train_end", "save", "epoch"] = "train_end",
        output_dir: str | Path | None = None,
        evaluate: bool = True,
        push_to_hub: bool = False,
        hub_model_id: str | None = None,
        checkpoints: Literal["all"] | int | None = None,
        tune: bool | TuningGrid = False,
        *,
        attribute: str | None = None,
        best_weights: bool = False,
        **options: Any,
    ):
        super().__init__(
            models,
            base_model,
            config,
            when,
            output_dir,
            evaluate,
            push_to_hub,
            hub_model_id,
            checkpoints,
            tune,
            **options,
        )
        self._attribute = attribute
        self._best_weights = best_weights

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        training = self._training(trainer)
        if self._best_weights and not getattr(trainer.checkpoint_callback, "monitor", None):
            raise MergeError("best_weights=True needs a ModelCheckpoint(monitor=...) that tells what is best.")
        self._run.plan(training)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        self._saved_step = trainer.global_step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._merge_saved(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._run.when == "epoch":
            training = self._training(trainer)
            self._run.run_meanwhile(training, training.save())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._merge_saved(trainer)
        if self._run.when == "train_end":
            best = trainer.checkpoint_callback.best_model_path if self._best_weights else None
            if best == "":
                logger.warning("The ModelCheckpoint has saved nothing: the last weights are merged, not the best.")
            training = self._training(trainer, best)
            self._run.run(training, training.save())
        self._run.report_failures()

    def _merge_saved(self, trainer: Any) -> None:
        """Merge what was saved since the last step; a validation may have been going on when it was."""
        if self._run.when == "save" and self._saved_step == trainer.global_step:
            training = self._training(trainer)
            self._run.run_meanwhile(training, training.save())
        self._saved_step = None

    def _training(self, trainer: Any, best: str | None = None) -> LightningTraining:
        return LightningTraining(trainer, self._attribute, best)
