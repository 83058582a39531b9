"""Fine-tunes an encoder with transformers' Trainer, and merges it with two other experts when training ends.

    python examples/trainer_callback.py

The other experts are LoRA adapters in examples/experts. Full fine-tunes and adapters can be mixed.
"""

import argparse
from pathlib import Path

from questions import BASE, LABELS, Sentences
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments, set_seed

from neuromerge_hf import AutoMergedModel, NeuroMergeCallback, NeuroMergingConfig

EXPERTS = Path(__file__).resolve().parent / "experts"


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="questions")
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()

    set_seed(0)
    callback = NeuroMergeCallback(
        [EXPERTS / "reviews", EXPERTS / "languages"],  # the experts are checked before the first step
        config=NeuroMergingConfig(density=0.2),
    )
    trainer = Trainer(
        AutoModelForSequenceClassification.from_pretrained(BASE, id2label=dict(enumerate(LABELS))),
        TrainingArguments(
            options.output,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-4,
            eval_strategy="epoch",
            save_strategy="no",
            logging_steps=8,
            report_to="none",
        ),
        train_dataset=Sentences(held_out=False),
        eval_dataset=Sentences(held_out=True),
        compute_metrics=accuracy,
        callbacks=[callback],
    )
    trainer.train()

    # The scores are also in the log history, in every logger, and in the card of the merged model.
    print(f"trained: {callback.metrics['eval_accuracy']:.3f} of the held-out sentences right")
    print(f"merged:  {callback.metrics['merged_eval_accuracy']:.3f}")

    # The merged encoder works with the head that was trained here, or with the head of another expert.
    for head in ("trained", "reviews"):
        model = AutoMergedModel.from_pretrained(callback.merged_dir, head=head)
        print(f"{head}: {type(model).__name__} with the labels {', '.join(model.config.id2label.values())}")


if __name__ == "__main__":
    main()
