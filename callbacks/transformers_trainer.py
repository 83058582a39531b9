"""The Trainer of transformers as a `Training`."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy, sort_checkpoints

from neuromerge_hf.callbacks.common.processes import is_distributed
from neuromerge_hf.callbacks.common.sharded import check_zero
from neuromerge_hf.callbacks.common.trained_model import (
    adapter_config,
    expert_folder,
    replaced_model,
    save_task_config,
)
from neuromerge_hf.callbacks.trl_trainers import why_not_evaluated
from neuromerge_hf.errors import MergeError


class TrainerTraining:
    """Training by a Trainer, see `neuromerge_hf.callbacks.common.training.Training`."""

    def __init__(self, trainer: Trainer, steps: Sequence[int], step: int | None = None):
        self.trainer = trainer
        self.steps = steps
        self.step = trainer.state.global_step if step is None else step
        unwrapped = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        # A SentenceTransformer is a sequence of modules around the network.
        self.model = getattr(unwrapped, "transformers_model", unwrapped)
        _check(trainer, self.model)
        self.folder = Path(str(trainer._get_output_dir(getattr(trainer, "_trial", None)))).absolute()
        self.written: Sequence[Path] = [self.folder]
        self.trial = self.folder.name if trainer.state.is_hyper_param_search else None
        self.name = trainer.args.hub_model_id or Path(str(trainer.args.output_dir)).resolve().name
        self.tokenizer = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
        self.push_options = {"token": trainer.args.hub_token, "private": trainer.args.hub_private_repo}
        self.sharded = (
            trainer.is_fsdp_enabled
            or trainer.is_deepspeed_enabled
            or getattr(trainer, "is_distributed_loading_by_transformers", False)
        )
        # Otherwise its checkpoints are sharded, or have the names that torch.compile gives to weights.
        fsdp = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
        self.saves_itself = "FULL" in str(fsdp.state_dict_type) if fsdp else unwrapped is trainer.model
        self.saves = trainer.args.save_strategy != SaveStrategy.NO
        self.keeps_checkpoints = self.saves and self.saves_itself
        limit = trainer.args.save_total_limit
        self.kept = limit if limit and limit > 0 else None
        self.evaluates = trainer.eval_dataset is not None or getattr(trainer, "evaluator", None) is not None
        metric = trainer.args.metric_for_best_model
        self.metric = f"eval_{(metric or 'loss').removeprefix('eval_')}"
        self.greater_is_better = bool(metric and trainer.args.greater_is_better)
        self.not_evaluated = why_not_evaluated(trainer, adapter_config(self.model) is not None)

    def pushes(self, folder: Path) -> bool:
        """As `Trainer.push_to_hub` and `Trainer._push_from_checkpoint` do."""
        output, args = Path(str(self.trainer.args.output_dir)).resolve(), self.trainer.args
        if not args.push_to_hub or not folder.is_relative_to(output):
            return False
        path = folder.relative_to(output).as_posix()
        if path.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
            return args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
        return not path.startswith("_")

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def steps_on_disk(self) -> list[int]:
        steps = [int(path.rpartition("-")[2]) for path in sort_checkpoints(str(self.folder))]
        return [step for step in steps if step <= self.step]

    def kept_steps(self) -> list[int]:
        return [step for step in self.steps if self.checkpoint(step).is_dir()]

    def checkpoints(self) -> Iterator[Path]:
        for step in sorted(self.kept_steps(), reverse=True):
            if step != self.step:
                yield expert_folder(self.model, self.checkpoint(step))

    def save(self, folder: Path) -> None:
        trainer = self.trainer
        with replaced_model(folder) if trainer.args.should_save else nullcontext(folder) as made:
            if self.saves_itself:
                trainer.save_model(str(made), _internal_call=True)
            else:
                parts = trainer.model if trainer.is_fsdp_enabled else self.model
                trainer._save(str(made), state_dict=trainer.accelerator.get_state_dict(parts))
            if trainer.args.should_save:
                save_task_config(self.model, expert_folder(self.model, made))

    def evaluate(self) -> dict[str, float]:
        trainer = self.trainer
        if not self.evaluates:
            return {}
        with _preserved_trainer(trainer):
            trainer.state.log_history = []
            trainer.evaluate()
            return _evaluated(trainer.state.log_history)

    def evaluate_trained(self) -> dict[str, float]:
        history = self.trainer.state.log_history
        known = _evaluated(entry for entry in history if entry.get("step") == self.step)
        if known:
            return known
        metrics = self.evaluate()
        if metrics:
            self.log(metrics)
        return metrics

    def log(self, metrics: Mapping[str, float]) -> None:
        control = self.trainer.control
        flags = dict(vars(control))
        Trainer.log(self.trainer, dict(metrics))  # TRL's own method would add the metrics of training
        self.trainer.control = control
        vars(control).update(flags)


def _check(trainer: Trainer, model: Any) -> None:
    """Raise a `MergeError` if the model, or the way in which it is trained, does not allow a merge."""
    if not isinstance(model, PreTrainedModel | PeftModel):
        raise MergeError(f"The model in training, a {type(model).__name__}, is not of transformers or PEFT.")
    if trainer.args.world_size > 1 and not is_distributed():
        raise MergeError(f"Training on {trainer.args.parallel_mode} without torch.distributed cannot end in a merge.")
    if trainer.is_deepspeed_enabled:
        check_zero(trainer.accelerator.deepspeed_config)


def _evaluated(entries: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of an evaluation in the log history, which has one entry for each data set."""
    return {name: value for entry in entries for name, value in entry.items() if name.startswith("eval_")}


@contextmanager
def _preserved_trainer(trainer: Trainer) -> Iterator[None]:
    """Undo the changes that an evaluation in the block makes to the trainer, except to its model's weights."""
    handler = trainer.callback_handler
    model: Any = trainer.model
    kept = (trainer.state, trainer.control, trainer.optimizer, handler.callbacks)
    modes = {module: module.training for module in model.modules()}
    trainer.state, trainer.control = copy.deepcopy(trainer.state), copy.copy(trainer.control)
    handler.callbacks = []
    trainer.optimizer = None  # a schedule-free optimizer changes the weights before an evaluation
    try:
        yield
    finally:
        trainer.state, trainer.control, trainer.optimizer, handler.callbacks = kept
        for module, training in modes.items():
            module.training = training
