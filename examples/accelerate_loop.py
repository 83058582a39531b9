"""Fine-tunes an encoder in a loop of one's own with accelerate, and merges it with two other experts at the end.

python examples/accelerate_loop.py
accelerate launch --num_processes 2 --cpu examples/accelerate_loop.py
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from questions import BASE, LABELS, Sentences
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from neuromerge_hf import AutoMergedModel
from neuromerge_hf.callbacks.accelerate import merge_at_end

EXPERTS = Path(__file__).resolve().parent / "experts"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="questions-loop")
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()

    set_seed(0)
    accelerator = Accelerator(project_dir=options.output)
    model = AutoModelForSequenceClassification.from_pretrained(BASE, id2label=dict(enumerate(LABELS)))
    model, optimizer, batches, held_out = accelerator.prepare(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-4),
        DataLoader(Sentences(held_out=False), batch_size=8, shuffle=True),
        DataLoader(Sentences(held_out=True), batch_size=8),
    )

    def evaluate(model):
        model.eval()
        right = []
        for batch in held_out:
            with torch.no_grad():
                found = model(**batch).logits.argmax(-1)
            right.append(accelerator.gather_for_metrics((found == batch["labels"]).float()))
        return {"accuracy": torch.cat(right).mean().item()}

    experts = [EXPERTS / "reviews", EXPERTS / "languages"]  # they are checked before the block
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    with merge_at_end(accelerator, model, experts, processing_class=tokenizer, evaluate=evaluate) as merging:
        model.train()
        steps = (batch for _ in range(options.steps) for batch in batches)
        for _, batch in zip(range(options.steps), steps, strict=False):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()

    accelerator.print(f"trained: {merging.metrics['accuracy']:.3f} of the held-out sentences right")
    accelerator.print(f"merged:  {merging.metrics['merged_accuracy']:.3f}")
    merged = AutoMergedModel.from_pretrained(merging.merged_dir, head="trained")
    accelerator.print(f"{type(merged).__name__} with the labels {', '.join(merged.config.id2label.values())}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
