"""Which tokens the rows of each model's embeddings are, and which they will be in the merged model."""

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one model.

    Attributes:
        tokens: the row of each token that has one, by its text.
        rows: how many rows the embeddings have. Those that are no token's are padding.
    """

    tokens: dict[str, int]
    rows: int

    @cached_property
    def texts(self) -> dict[int, str]:
        """The token of each row; the first in the order of the alphabet where several share it."""
        return {row: token for token, row in sorted(self.tokens.items(), key=str, reverse=True)}

    def rows_in(self, other: "Vocabulary") -> Tensor:
        """Where the rows of this vocabulary are in another one: (rows,) int64, -1 for those that it lacks.

        Padding is nowhere, unless both have the same tokens: then it is where its number is.
        """
        if self.tokens == other.tokens:
            numbers = torch.arange(self.rows)
            return numbers.where(numbers < other.rows, -1)
        found = [-1] * self.rows
        for row, token in self.texts.items():
            found[row] = other.tokens.get(token, -1)
        return torch.tensor(found)


@dataclass(frozen=True)
class Alignment:
    """How the tokens of models with different vocabularies are brought together.

    Attributes:
        target: the merged model's vocabulary.
        base: the base's.
        experts: each expert's.
        chosen: the expert whose vocabulary is the target; None if it is the base's, or made from the base's.
    """

    target: Vocabulary
    base: Vocabulary
    experts: tuple[Vocabulary, ...]
    chosen: int | None = None

    @cached_property
    def base_rows(self) -> Tensor:
        """The base's row of each row of the target, or -1."""
        rows = self.target.rows_in(self.base)
        if self.chosen is None:  # the base's padding stays, but where a new token has its row
            padding = [row for row in range(self.base.rows) if row not in self.target.texts]
            rows[padding] = torch.tensor(padding, dtype=torch.int64)
        return rows

    def expert_rows(self, expert: int) -> Tensor:
        """An expert's row of each row of the target, or -1."""
        rows = self.target.rows_in(self.experts[expert])
        if expert != self.chosen:  # padding is merged with that of a base with the same tokens, else it is left out
            is_padding = torch.ones(self.target.rows, dtype=torch.bool)
            is_padding[list(self.target.texts)] = False
            rows[is_padding & ((self.base_rows < 0) | (self.base.tokens != self.target.tokens))] = -1
        return rows

    def renumbered(self, ids: Any, vocabulary: Vocabulary) -> Any:
        """Token ids (a number, None, or lists of them) of a vocabulary as they are in the target."""
        if isinstance(ids, list):
            renumbered = [self.renumbered(each, vocabulary) for each in ids]
            return [new for new, old in zip(renumbered, ids, strict=True) if new is not None or old is None]
        return self.target.tokens.get(vocabulary.texts[ids]) if ids in vocabulary.texts else ids


def vocabulary_size(config: PretrainedConfig) -> int | None:
    """How many rows the embeddings of a configuration's model have; None if it has no vocabulary."""
    return getattr(config.get_text_config(), "vocab_size", None)


def resized(config: PretrainedConfig, rows: int) -> PretrainedConfig:
    """A copy of a configuration for embeddings with another number of rows."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.vocab_size = rows
    for part in (config, text):
        if getattr(part, "pad_token_id", None) is not None and part.pad_token_id >= rows:
            part.pad_token_id = None
    return config
