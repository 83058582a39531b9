"""Real trainings of tiny models, of a few steps each."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from tiny_models import load, seeded

CLASSIFIER = "BertForSequenceClassification"


class Texts(Dataset):
    """Sixteen labelled sequences of eight tokens: the label is in the first one."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(7, 40, (8,), generator=torch.Generator().manual_seed(index))
        ids[0] = 5 + index % 2
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(index % 2)}


def classifier(base: Path | str, *, adapter: bool = False) -> PreTrainedModel:
    """A BERT from `base` with a fresh head for two classes, and a fresh LoRA if asked for."""
    with seeded(5):
        model = load(base, CLASSIFIER, num_labels=2)
        if adapter:
            model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
    return model


def arguments(folder: Path, **changes) -> TrainingArguments:
    settings = {
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


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def train(model, folder: Path, *callbacks: TrainerCallback, resume: bool = False, **changes) -> Trainer:
    """Train a classifier in `folder`; `changes` go to its TrainingArguments."""
    trainer = make_trainer(model, folder, *callbacks, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def make_trainer(model, folder: Path, *callbacks: TrainerCallback, init=None, **changes) -> Trainer:
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
    """The entries of the log history that hold a metric of this prefix."""
    return [entry for entry in trainer.state.log_history if any(name.startswith(prefix) for name in entry)]
