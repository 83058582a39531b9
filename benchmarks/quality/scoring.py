"""Scores an encoder on several tasks, with the classifier of each task's expert."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from experts import BASE, BATCH_SIZE, Batch, features, sorted_batches, tokenize
from peft import PeftModel
from safetensors.torch import load_file
from tasks import Split, load_splits
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

Answers = dict[str, str]
"""For each task, a "1" for each text that was told right and a "0" for each other one, in the order of the batches."""

Encoder = dict[str, Tensor]
"""The weights of an encoder, by their names in the base's checkpoint."""


def load_base() -> Encoder:
    """Return the pretrained encoder in float32."""
    weights = load_file(BASE / "model.safetensors")
    return {name: weight.float() for name, weight in weights.items() if weight.is_floating_point()}


def load_expert(folder: Path) -> BertForSequenceClassification:
    """Load an expert as a plain classifier. An adapter is merged into the base."""
    config = AutoConfig.from_pretrained(folder)
    if not (folder / "adapter_config.json").is_file():
        return AutoModelForSequenceClassification.from_pretrained(folder, config=config).eval()
    model = AutoModelForSequenceClassification.from_pretrained(BASE, config=config)
    return PeftModel.from_pretrained(model, folder).merge_and_unload().eval()


def encoder_of(model: BertForSequenceClassification) -> Encoder:
    """Return the weights of a classifier's encoder under the names of the base."""
    return {name: weight for name, weight in model.bert.state_dict().items() if weight.is_floating_point()}


class Scorer:
    """Measures the accuracy of encoders on one split of some tasks.

    Args:
        folders: the folder of each task's expert.
        data: the folder of the archives with the texts.
        split: "validation" or "test".
        kind: the kind of the experts, which decides what their classifiers read.
    """

    def __init__(self, folders: Mapping[str, Path], data: Path, split: Split, kind: str):
        self.kind = kind
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        self.experts = {task: load_expert(folder) for task, folder in folders.items()}
        self.batches: dict[str, list[Batch]] = {}
        for task in folders:
            examples = tokenize(tokenizer, getattr(load_splits(task, data), split))
            self.batches[task] = list(sorted_batches(tokenizer, examples, 2 * BATCH_SIZE))

    def score(self, encoder: Encoder, tasks: Sequence[str] | None = None) -> Answers:
        """Return which texts an encoder tells right, by task."""
        model = next(iter(self.experts.values()))
        own = {name: weight.clone() for name, weight in encoder_of(model).items()}
        try:
            model.bert.load_state_dict(encoder, strict=False)
            return {task: self._answers(model, task) for task in tasks or self.batches}
        finally:
            model.bert.load_state_dict(own, strict=False)

    def score_experts(self, tasks: Sequence[str] | None = None) -> Answers:
        """Return which texts each expert tells right, on its own task."""
        return {task: self._answers(self.experts[task], task) for task in tasks or self.experts}

    @torch.inference_mode()
    def _answers(self, model: BertForSequenceClassification, task: str) -> str:
        head = self.experts[task].classifier
        right = ""
        with torch.autocast("cpu", torch.bfloat16):
            for inputs, labels in self.batches[task]:
                predicted = head(features(model, inputs, self.kind)).argmax(dim=-1)
                right += "".join(str(int(hit)) for hit in predicted == labels)
        return right
