"""A training loop with accelerate as a `Training`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from transformers import PreTrainedModel

from neuromerge_hf.callbacks.common.processes import on_first_process
from neuromerge_hf.callbacks.common.sharded import check_zero
from neuromerge_hf.callbacks.common.trained_model import expert_folder, replaced_model, save_task_config
from neuromerge_hf.callbacks.common.weights import HuggingFaceModel
from neuromerge_hf.errors import MergeError

Evaluate = Callable[[Any], Mapping[str, float]]
"""A function that evaluates a model and returns its metrics by their names."""


class AccelerateTraining:
    """A loop around an Accelerator, see `neuromerge_hf.callbacks.common.training.Training`."""

    trial: str | None = None
    not_evaluated: str | None = None
    saves = keeps_checkpoints = False
    kept: int | None = 0
    step = 0

    def __init__(
        self,
        accelerator: Accelerator,
        model: Any,
        tokenizer: Any,
        evaluate: Evaluate | None,
        metric: str,
        greater_is_better: bool,
    ):
        self.accelerator = accelerator
        self.prepared = model
        self.model: HuggingFaceModel = accelerator.unwrap_model(model, keep_torch_compile=False)
        if not isinstance(self.model, PreTrainedModel | PeftModel):
            raise MergeError(f"The model in training, a {type(self.model).__name__}, is not of transformers or PEFT.")
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            check_zero(accelerator.deepspeed_config)
        self.tokenizer = tokenizer
        self.folder = Path(accelerator.project_dir or ".").absolute()
        self.written: Sequence[Path] = [self.folder]
        self.name = self.folder.name
        self.sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        self.evaluates = evaluate is not None
        self.metric = metric
        self.greater_is_better = greater_is_better
        self.push_options: dict[str, Any] = {}
        self._evaluate = evaluate

    def pushes(self, folder: Path) -> bool:
        return False

    def save(self, folder: Path) -> None:
        weights = self.accelerator.get_state_dict(self.prepared) if self.sharded else None
        on_first_process(lambda: self._save(folder, weights))

    def _save(self, folder: Path, weights: Any) -> None:
        with replaced_model(folder) as made:
            self.model.save_pretrained(str(made), state_dict=weights)
            save_task_config(self.model, expert_folder(self.model, made))
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(made)

    def kept_steps(self) -> list[int]:
        return []

    def checkpoints(self) -> Iterable[Path]:
        return []

    def evaluate(self) -> dict[str, float]:
        if self._evaluate is None:
            return {}
        modes = {module: module.training for module in self.prepared.modules()}
        try:
            return {name: float(value) for name, value in self._evaluate(self.prepared).items()}
        finally:
            for module, training in modes.items():
                module.training = training

    def evaluate_trained(self) -> dict[str, float]:
        metrics = self.evaluate()
        self.log(metrics)
        return metrics

    def log(self, metrics: Mapping[str, float]) -> None:
        if self.accelerator.trackers:
            self.accelerator.log(dict(metrics))
