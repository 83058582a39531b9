"""Measures the accuracy of a classifier on a task's held-out texts."""

import torch
from data import Task
from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKENS = 32
TEST_LIMIT = 300


@torch.inference_mode()
def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    limit: int | None = TEST_LIMIT,
    batch_size: int = 64,
) -> float:
    """Return the share of a task's test texts that a model labels correctly.

    The test texts have a fixed random order, so every model is measured on the same sample. Batches hold texts of
    similar length, because padding costs as much as text.

    Args:
        model: a classifier with the task's labels.
        tokenizer: the model's tokenizer.
        task: the task with its texts.
        limit: the number of test texts to use; None for all.
        batch_size: the number of texts to classify at once.
    """
    model.eval()
    examples = sorted(task.test[:limit], key=lambda example: len(example[0]))
    correct = 0
    for start in range(0, len(examples), batch_size):
        texts, labels = zip(*examples[start : start + batch_size], strict=True)
        inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt").to(
            model.device
        )
        predicted = model(**inputs).logits.argmax(dim=-1).cpu()
        correct += int((predicted == torch.tensor(labels)).sum())
    return correct / len(examples)
