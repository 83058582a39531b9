"""Scores a language model on skills: exact answers, loss, and perplexity of neutral text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from model import answer_logits, batches, encode, load_tokenizer, save_base
from skills import Split, load_skill, neutral_text
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

BATCH_SIZE = 25
WINDOW = 512
"""The length of a piece of neutral text, in tokens."""


@dataclass(frozen=True)
class Score:
    """The score of a model on one skill.

    Attributes:
        right: for each prompt, whether the greedy answer is exactly the right one.
        loss: for each prompt, the mean loss of the right answer's tokens.
    """

    right: list[bool]
    loss: list[float]


class Scorer:
    """Scores models on one split of some skills.

    Greedy decoding gives the right answer if and only if each of its tokens, with the end of the turn, is the most
    likely one after the prompt and the right tokens before it. So one pass over prompt and answer tells.

    Args:
        cache: the folder of the base, the experts and the texts.
        skills: the names of the skills.
        split: the split of their examples.
    """

    def __init__(self, cache: Path, skills: Sequence[str], split: Split):
        tokenizer = load_tokenizer(cache)
        self._model = LlamaForCausalLM.from_pretrained(save_base(cache), dtype=torch.float32).eval()
        self._parameters = dict(self._model.named_parameters())  # without the head, which is the embeddings
        self._base = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._batches = {
            skill: list(
                batches(
                    encode(tokenizer, getattr(load_skill(skill, cache / "data"), split)),
                    BATCH_SIZE,
                    tokenizer.pad_token_id,
                )
            )
            for skill in skills
        }
        tokens = tokenizer.encode(neutral_text(cache / "data"))
        self._neutral = torch.tensor(tokens[: len(tokens) // WINDOW * WINDOW]).view(-1, WINDOW)

    def score(self, state: Mapping[str, Tensor], skills: Sequence[str] | None = None) -> dict[str, Score]:
        """Return the score on each skill (by default, on all) of the base with these weights in place of its own."""
        self._load(state)
        return {skill: self._score(skill) for skill in skills or self._batches}

    @torch.inference_mode()
    def perplexity(self, state: Mapping[str, Tensor]) -> float:
        """Return the perplexity of the neutral text for the base with these weights in place of its own."""
        self._load(state)
        losses = []
        for window in self._neutral:
            with torch.autocast("cpu", torch.bfloat16):
                logits = self._model(window.unsqueeze(0), use_cache=False).logits[0, :-1]
            losses.append(cross_entropy(logits.float(), window[1:]).item())
        return math.exp(sum(losses) / len(losses))

    @torch.inference_mode()
    def _score(self, skill: str) -> Score:
        count = sum(len(batch.examples) for batch in self._batches[skill])
        right, loss = [False] * count, [0.0] * count
        for batch in self._batches[skill]:
            with torch.autocast("cpu", torch.bfloat16):
                logits, targets, rows = answer_logits(self._model, batch)
            losses = cross_entropy(logits.float(), targets, reduction="none")
            hits = logits.argmax(1) == targets
            for row, example in enumerate(batch.examples):
                right[example] = bool(hits[rows == row].all())
                loss[example] = losses[rows == row].mean().item()
        return Score(right, loss)

    @torch.no_grad()
    def _load(self, state: Mapping[str, Tensor]) -> None:
        if unknown := state.keys() - self._base.keys():
            raise ValueError(f"The base has no parameters {', '.join(sorted(unknown))}.")
        for name, parameter in self._parameters.items():
            parameter.copy_(state.get(name, self._base[name]))
