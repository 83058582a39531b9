"""The Trainer of Lightning as a `Training`."""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from neuromerge_hf.callbacks.common.places import ROOT
from neuromerge_hf.callbacks.common.processes import on_first_process
from neuromerge_hf.callbacks.common.sharded import is_sharded
from neuromerge_hf.callbacks.common.trained_model import expert_folder, replaced_model, save_task_config
from neuromerge_hf.callbacks.common.weights import HuggingFaceModel, replaced
from neuromerge_hf.callbacks.lightning_package import DummyLogger
from neuromerge_hf.errors import MergeError


class CheckpointFiles:
    """The files that `ModelCheckpoint` saved in this training, with their steps. One name may be saved again."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int]] = {}

    def note(self, callbacks: Sequence[Any], step: int) -> None:
        """Record the files that were saved since the last call, at a step."""
        for path in {path for each in callbacks for path in (*each.best_k_models, each.best_model_path)}:
            if os.path.exists(path) and (changed := os.stat(path).st_mtime_ns) != self._seen.get(path, (0, 0))[0]:
                self._seen[path] = changed, step

    def kept(self) -> dict[str, int]:
        """The steps of the files that are still there, by their paths."""
        return {path: step for path, (_, step) in self._seen.items() if os.path.exists(path)}


class LightningTraining:
    """Training by a Lightning trainer, see `neuromerge_hf.callbacks.common.training.Training`."""

    trial: str | None = None
    not_evaluated: str | None = None

    def __init__(self, trainer: Any, attribute: str | None, files: CheckpointFiles, best: str | None = None):
        attribute = attribute or _find_model(trainer.lightning_module)
        self.trainer = trainer
        self.push_options: dict[str, Any] = {}
        self.prefix = f"{attribute}."
        self.best = best
        self.files = files
        self.model: HuggingFaceModel = trainer.lightning_module.get_submodule(attribute)
        self.folder = Path(trainer.default_root_dir).absolute()
        self.name = self.folder.name
        self.written: Sequence[Path] = [
            self.folder,
            *(Path(callback.dirpath) for callback in trainer.checkpoint_callbacks if callback.dirpath),
        ]
        self.step = trainer.global_step
        attributes = vars(trainer.lightning_module).values()
        self.tokenizer = next((value for value in attributes if isinstance(value, PreTrainedTokenizerBase)), None)
        self.sharded = is_sharded(trainer.strategy)
        self.evaluates = trainer.enable_validation
        monitored = next((callback for callback in trainer.checkpoint_callbacks if callback.monitor), None)
        self.metric = monitored.monitor if monitored else "val_loss"
        self.greater_is_better = monitored is not None and monitored.mode == "max"
        self.saves = self.keeps_checkpoints = bool(trainer.checkpoint_callbacks)
        numbers = [callback.save_top_k for callback in trainer.checkpoint_callbacks]
        self.kept = None if -1 in numbers else sum(numbers)

    def pushes(self, folder: Path) -> bool:
        return False

    def save(self, folder: Path) -> None:
        weights = {} if self.best else self.trainer.strategy.lightning_module_state_dict()
        on_first_process(lambda: self._save(folder, self._read(self.best)["state_dict"] if self.best else weights))

    def kept_steps(self) -> list[int]:
        return list(self.files.kept().values())

    def checkpoints(self) -> Iterator[Path]:
        """Convert the files that ModelCheckpoint keeps to folders in the format of transformers and PEFT."""
        restored = {path for callback in self.trainer.checkpoint_callbacks for path in callback.best_k_models}
        paths = restored | self.files.kept().keys()
        for path in sorted(filter(os.path.isfile, paths - {self.best}), key=os.path.getmtime, reverse=True):
            checkpoint = self._read(path)
            if checkpoint["global_step"] != self.step or self.best:
                folder = self.folder / ROOT / f"checkpoint-{checkpoint['global_step']}"
                self._save(folder, checkpoint["state_dict"])
                yield expert_folder(self.model, folder)

    def _save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        own = {name.removeprefix(self.prefix): value for name, value in weights.items() if name.startswith(self.prefix)}
        with replaced_model(folder) as made:
            self.model.save_pretrained(str(made), state_dict=own)
            save_task_config(self.model, expert_folder(self.model, made))
            if self.tokenizer:
                self.tokenizer.save_pretrained(made)

    def _read(self, path: str | None) -> dict[str, Any]:
        return self.trainer.strategy.checkpoint_io.load_checkpoint(path, weights_only=False)  # safe: this run wrote it

    def evaluate(self) -> dict[str, float]:
        """Run the validation loop as during training. `trainer.validate` would end the training."""
        with _isolated_validation(self.trainer) as connector:
            self.trainer.fit_loop.epoch_loop.val_loop.run()
            return {name: float(value) for name, value in connector.callback_metrics.items()}

    def evaluate_trained(self) -> dict[str, float]:
        if not self.best:
            return self.evaluate()
        weights: dict[str, Tensor] = {}
        on_first_process(lambda: weights.update(self._read(self.best)["state_dict"]))
        with replaced(self.trainer.lightning_module.state_dict(), weights, self.folder):
            return self.evaluate()

    def log(self, metrics: Mapping[str, float]) -> None:
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        for logger in self.trainer.loggers:
            logger.log_metrics(dict(metrics), step=self.step)
            logger.save()


@contextmanager
def _isolated_validation(trainer: Any) -> Iterator[Any]:
    """Hide a validation in the block from callbacks and loggers, and restore the trainer's counters after it.

    Yields:
        The object that collects the metrics.
    """
    loop = trainer.fit_loop.epoch_loop
    kept = trainer.callbacks, trainer.loggers, trainer._logger_connector, trainer.state.stage, loop.val_loop
    modes = {module: module.training for module in trainer.lightning_module.modules()}
    trainer.callbacks, trainer.loggers = [], [DummyLogger()]  # for modules that use the trainer's logger
    trainer._logger_connector = type(trainer._logger_connector)(trainer)
    loop.val_loop = copy.copy(loop.val_loop)
    for name in ("batch_progress", "_seen_batches_per_dataloader"):
        setattr(loop.val_loop, name, copy.deepcopy(getattr(loop.val_loop, name)))
    loop.val_loop._results = type(loop.val_loop._results)(training=False)
    loop.val_loop._module_mode = type(loop.val_loop._module_mode)()
    trainer.validating = True
    try:
        yield trainer._logger_connector
    finally:
        trainer.callbacks, trainer.loggers, trainer._logger_connector, trainer.state.stage, loop.val_loop = kept
        for module, training in modes.items():
            module.training = training


def _find_model(module: nn.Module) -> str:
    """The path of the only model of transformers or PEFT in a LightningModule."""
    found: list[str] = []
    for name, child in module.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(child, PreTrainedModel | PeftModel) and not inside:
            found.append(name)
    if len(found) == 1:
        return found[0]
    raise MergeError(
        f"The LightningModule has the models {', '.join(found)}. Say which one is to be merged: attribute={found[0]!r}."
        if found
        else f"The {type(module).__name__} has no model of transformers or PEFT among its attributes."
    )
