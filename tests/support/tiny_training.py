"""Training tiny models for a few steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from tiny_models import load, seeded

CLASSIFIER = "BertForSequenceClassification"

TRAINED, AVERAGED, MERGED = (Path("_neuromerge", name) for name in ("trained", "averaged", "merged"))
"""The folders of a callback's models in that of the training."""


def merge_of(folder: Path, step: int) -> Path:
    """The folder of the merge of the model after so many steps, which was made during training."""
    return folder / "_neuromerge" / f"step-{step}" / "merged"


def merges(folder: Path) -> set[int]:
    """The steps at which the merges that are there were made."""
    found = (folder / "_neuromerge").glob("step-*/merged")
    return {int(path.parent.name.removeprefix("step-")) for path in found}


class Texts(Dataset[dict[str, torch.Tensor]]):
    """Sixteen labelled sequences of eight tokens: the label is in the first one."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(7, 40, (8,), generator=torch.Generator().manual_seed(index))
        ids[0] = 5 + index % 2
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(index % 2)}


def classifier(base: Path | str, *, adapter: bool = False) -> Any:
    """A BERT from `base` with a new head for two classes and, for an `adapter`, a new LoRA."""
    with seeded(5):
        model: Any = load(base, CLASSIFIER, num_labels=2)
        if adapter:
            model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
    return model


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **(settings | changes))


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    predicted: Any = prediction.predictions
    return {"accuracy": float((predicted.argmax(-1) == prediction.label_ids).mean())}


def train(model: Any, folder: Path, *callbacks: TrainerCallback, resume: bool = False, **changes: Any) -> Trainer:
    """Train a classifier in `folder`. `changes` go to its TrainingArguments."""
    trainer = make_trainer(model, folder, *callbacks, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def make_trainer(
    model: Any, folder: Path, *callbacks: TrainerCallback, init: Callable[..., Any] | None = None, **changes: Any
) -> Trainer:
    return Trainer(
        model,
        arguments(folder, **changes),
        model_init=init,
        train_dataset=Texts(),
        eval_dataset=Texts(),
        compute_metrics=accuracy,
        callbacks=list(callbacks),
    )


@torch.no_grad()
def measure(model: torch.nn.Module) -> dict[str, float]:
    """Loss and accuracy on the texts, computed directly."""
    model.eval()
    texts = [Texts()[index] for index in range(len(Texts()))]
    batch = {name: torch.stack([text[name] for text in texts]) for name in texts[0]}
    output = model(**batch)
    right = output.logits.argmax(-1) == batch["labels"]
    return {"loss": output.loss.item(), "accuracy": right.float().mean().item()}


def logged(trainer: Trainer, prefix: str) -> list[dict[str, float]]:
    """The entries of the log history that hold a metric with this prefix."""
    return [entry for entry in trainer.state.log_history if any(name.startswith(prefix) for name in entry)]
