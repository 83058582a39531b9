"""Trains the demo's experts: one LoRA adapter per task on all-MiniLM-L6-v2, with plain transformers and peft.

    python examples/train_experts.py                        # rewrites examples/experts
    python examples/train_experts.py --full --output full   # full fine-tunes of the same tasks as well, in full/

All experts start from the same weights, as merging requires. Each is a BertForSequenceClassification with its own
head, which is trained and saved with the expert, and never merged.
"""

import argparse
import copy
import math
import random
import time
from pathlib import Path

import torch
from data import CACHE, TASKS, Task, load_task
from evaluate import MAX_TOKENS, accuracy
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

BASE = "sentence-transformers/all-MiniLM-L6-v2"
EXPERTS = Path(__file__).resolve().parent / "experts"
TRAIN_LIMIT = 4000
BATCH_SIZE = 32
LORA_RATE = 2e-3
FULL_RATE = 1e-4
HEAD_RATE = 5e-3  # the head starts from noise, so it needs larger steps than the encoder
EPOCHS = {"newsgroups": 3, "reviews": 2, "cities": 6, "names": 6, "languages": 6}  # short texts are cheap

Model = PreTrainedModel | PeftModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=BASE, help="Hub id or folder of the base model (%(default)s)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--epochs", type=int, help=f"the default depends on the task: {EPOCHS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=EXPERTS, help="one folder per task is written here")
    parser.add_argument("--full", action="store_true", help="train every parameter instead of a LoRA adapter")
    parser.add_argument("--data", type=Path, default=CACHE, help="where the downloaded archives are kept")
    arguments = parser.parse_args()
    if arguments.full and arguments.output.resolve() == EXPERTS:
        parser.error("--full needs an --output folder of its own: examples/experts holds adapters")

    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    for name in arguments.tasks:
        task = load_task(name, arguments.data)
        start = time.perf_counter()
        set_seed(arguments.seed)
        model = new_expert(task, arguments.base, full=arguments.full)
        train(model, tokenizer, task, epochs=arguments.epochs or EPOCHS[name], seed=arguments.seed)
        seconds = time.perf_counter() - start
        save(model, tokenizer, arguments.output / name)
        print(f"{name}: {accuracy(model, tokenizer, task):.3f} accuracy after {seconds:.0f} s of training")


def new_expert(task: Task, base: str, full: bool = False, rank: int = 4) -> Model:
    """Load the base encoder with a new head for `task`, and with a new LoRA adapter of rank `rank` unless `full`."""
    model = AutoModelForSequenceClassification.from_pretrained(
        base,
        dtype=torch.float32,
        id2label=dict(enumerate(task.labels)),
        label2id={label: i for i, label in enumerate(task.labels)},
    )
    if full:
        return model
    lora = LoraConfig(
        task_type="SEQ_CLS",  # makes peft train and save the head too
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["query", "key", "value", "dense"],  # "dense" includes the pooler, which the head reads
    )
    return get_peft_model(model, lora)


def train(model: Model, tokenizer: PreTrainedTokenizerBase, task: Task, epochs: int, seed: int) -> None:
    """Train with AdamW, 10% warm-up and linear decay, on at most `TRAIN_LIMIT` texts."""
    examples = list(task.train[:TRAIN_LIMIT])
    steps = epochs * math.ceil(len(examples) / BATCH_SIZE)
    warmup = max(1, steps // 10)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = [parameter for name, parameter in trained.items() if "classifier" in name]
    encoder = [parameter for name, parameter in trained.items() if "classifier" not in name]
    encoder_rate = LORA_RATE if isinstance(model, PeftModel) else FULL_RATE
    optimizer = torch.optim.AdamW([{"params": encoder, "lr": encoder_rate}, {"params": head, "lr": HEAD_RATE}])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    order = random.Random(seed)
    model.train()
    for _ in range(epochs):
        for texts, labels in batches(examples, order):
            inputs = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            loss = model(**inputs, labels=torch.tensor(labels)).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def batches(examples: list[tuple[str, int]], order: random.Random) -> list[tuple[list[str], list[int]]]:
    """Return all examples in random batches of similar lengths, because padding costs as much as text."""
    shuffled = order.sample(examples, len(examples))
    block = 16 * BATCH_SIZE
    result = []
    for start in range(0, len(shuffled), block):
        by_length = sorted(shuffled[start : start + block], key=lambda example: len(example[0]))
        for first in range(0, len(by_length), BATCH_SIZE):
            texts, labels = zip(*by_length[first : first + BATCH_SIZE], strict=True)
            result.append((list(texts), list(labels)))
    order.shuffle(result)
    return result


def save(model: Model, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a full fine-tune as a checkpoint, or an adapter in float16 with the configuration that has the labels."""
    if not isinstance(model, PeftModel):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return
    small = copy.deepcopy(model).half()
    small.peft_config["default"].base_model_name_or_path = BASE  # also where --base is a local copy of it
    small.save_pretrained(folder)
    (folder / "README.md").unlink()  # peft's model card is empty
    classifier = model.get_base_model()
    classifier.config.architectures = [type(classifier).__name__]
    classifier.config.save_pretrained(folder)


if __name__ == "__main__":
    main()
