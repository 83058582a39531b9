"""Fine-tunes a LoRA adapter of an encoder with Lightning, and merges it with two other experts when training ends.

pip install lightning
python examples/lightning_callback.py
"""

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
from peft import LoraConfig, get_peft_model
from questions import BASE, LABELS, Sentences
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from neuromerge_hf import AutoMergedModel
from neuromerge_hf.callbacks.lightning import NeuroMergeCallback

EXPERTS = Path(__file__).resolve().parent / "experts"


class QuestionFinder(pl.LightningModule):
    """A LightningModule without code for merging. The callback finds the model and runs the validation loop."""

    def __init__(self):
        super().__init__()
        encoder = AutoModelForSequenceClassification.from_pretrained(BASE, id2label=dict(enumerate(LABELS)))
        lora = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "key", "value", "dense"])
        self.model = get_peft_model(encoder, lora).train()

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def validation_step(self, batch, index):
        right = self.model(**batch).logits.argmax(-1) == batch["labels"]
        self.log("val_accuracy", right.float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="questions-lora")
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()

    pl.seed_everything(0)
    callback = NeuroMergeCallback([EXPERTS / "reviews", EXPERTS / "languages"])
    trainer = pl.Trainer(
        max_steps=options.steps,
        accelerator="cpu",
        default_root_dir=options.output,
        logger=pl.loggers.CSVLogger(options.output),
        enable_checkpointing=False,
        log_every_n_steps=1,
        callbacks=[callback],
    )
    trainer.fit(
        QuestionFinder(),
        DataLoader(Sentences(held_out=False), batch_size=8, shuffle=True),
        DataLoader(Sentences(held_out=True), batch_size=16),
    )
    print(Path(trainer.logger.log_dir, "metrics.csv").read_text())  # has val_accuracy and merged_val_accuracy
    model = AutoMergedModel.from_pretrained(callback.merged_dir, head="trained")
    print(f"{type(model).__name__} with the labels {', '.join(model.config.id2label.values())}")


if __name__ == "__main__":
    main()
