"""The tokens of the embedding rows of each model, and their rows in the merged model."""

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
        tokens: the embedding row of each token, by the token's text.
        rows: the number of rows of the embeddings. Rows without a token are padding.
    """

    tokens: dict[str, int]
    rows: int

    @cached_property
    def texts(self) -> dict[int, str]:
        """The token of each row; the first in alphabetical order if several tokens share a row."""
        return {row: token for token, row in sorted(self.tokens.items(), key=str, reverse=True)}

    def rows_in(self, other: "Vocabulary") -> Tensor:
        """The row in another vocabulary of each row of this one: (rows,) int64, -1 if the other one lacks it.

        The other vocabulary lacks all padding, unless both have the same tokens. Then padding keeps its row.
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
    """How the tokens of models with different vocabularies are aligned.

    Attributes:
        target: the vocabulary of the merged model.
        base: the vocabulary of the base.
        experts: the vocabulary of each expert.
        chosen: the number of the expert whose vocabulary is the target; None if the target is made from the base's.
    """

    target: Vocabulary
    base: Vocabulary
    experts: tuple[Vocabulary, ...]
    chosen: int | None = None

    @cached_property
    def base_rows(self) -> Tensor:
        """The base's row for each row of the target: (target.rows,) int64, -1 if the base has none."""
        rows = self.target.rows_in(self.base)
        if self.chosen is None:  # the base's padding stays, except in the rows of new tokens
            padding = [row for row in range(self.base.rows) if row not in self.target.texts]
            rows[padding] = torch.tensor(padding, dtype=torch.int64)
        return rows

    def expert_rows(self, expert: int) -> Tensor:
        """An expert's row for each row of the target: (target.rows,) int64, -1 if it has none or must not be merged."""
        rows = self.target.rows_in(self.experts[expert])
        if expert != self.chosen:  # padding is merged only if the base has the target's tokens
            is_padding = torch.ones(self.target.rows, dtype=torch.bool)
            is_padding[list(self.target.texts)] = False
            rows[is_padding & ((self.base_rows < 0) | (self.base.tokens != self.target.tokens))] = -1
        return rows

    def renumbered(self, ids: Any, vocabulary: Vocabulary) -> Any:
        """Convert token ids (a number, None, or lists of them) of a vocabulary to the target's.

        An id without a token is unchanged. A token that the target lacks becomes None, and is left out of a list.
        """
        if isinstance(ids, list):
            renumbered = [self.renumbered(each, vocabulary) for each in ids]
            return [new for new, old in zip(renumbered, ids, strict=True) if new is not None or old is None]
        return self.target.tokens.get(vocabulary.texts[ids]) if ids in vocabulary.texts else ids


def vocabulary_size(config: PretrainedConfig) -> int | None:
    """The number of embedding rows of a configuration's model; None if it has no vocabulary."""
    return getattr(config.get_text_config(), "vocab_size", None)


def resized(config: PretrainedConfig, rows: int) -> PretrainedConfig:
    """A copy of a configuration with another number of embedding rows."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.vocab_size = rows
    for part in (config, text):
        if getattr(part, "pad_token_id", None) is not None and part.pad_token_id >= rows:
            part.pad_token_id = None
    return config
