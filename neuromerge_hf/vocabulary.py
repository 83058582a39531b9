"""Which tokens the rows of each model's embeddings are, and which they will be in the merged model."""

import copy
import filecmp
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig

from neuromerge_hf.checkpoint import tokenizer_files
from neuromerge_hf.errors import MergeError, Problems
from neuromerge_hf.location import Location

if TYPE_CHECKING:
    from tokenizers import AddedToken

SHOWN = 3
"""How many tokens an error names."""


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
        return {row: token for token, row in sorted(self.tokens.items(), reverse=True)}

    def rows_in(self, other: "Vocabulary") -> Tensor:
        """Where the rows of this vocabulary are in another one: (rows,) int64, -1 for those that it lacks.

        Padding is nowhere, unless both have the same tokens: then it is where its number is.
        """
        found = torch.full((self.rows,), -1)
        if self.tokens == other.tokens:
            common = min(self.rows, other.rows)
            found[:common] = torch.arange(common)
            return found
        for row, token in self.texts.items():
            found[row] = other.tokens.get(token, -1)
        return found


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
        if expert != self.chosen:  # whose padding is taken where the base has none
            is_token = torch.zeros(self.target.rows, dtype=torch.bool)
            is_token[list(self.target.texts)] = True
            rows[(self.base_rows < 0) & ~is_token] = -1
        return rows

    def renumbered(self, ids: Any, vocabulary: Vocabulary) -> Any:
        """Token ids (a number, None, or lists of them) of a vocabulary as they are in the target."""
        if isinstance(ids, list):
            renumbered = [self.renumbered(each, vocabulary) for each in ids]
            return [new for new, old in zip(renumbered, ids, strict=True) if new is not None or old is None]
        return self.target.tokens.get(vocabulary.texts[ids]) if ids in vocabulary.texts else ids


@dataclass(frozen=True)
class TokenizerChoice:
    """Where the merged model's tokenizer comes from.

    Attributes:
        location: the model that has its files.
        is_expert: whether that is an expert, and not the base.
        additions: tokens to be added to it.
        alignment: how rows are brought together; None where all models have the same.
    """

    location: Location
    is_expert: bool = False
    additions: "tuple[AddedToken, ...]" = ()
    alignment: Alignment | None = None


@dataclass(frozen=True)
class Candidate:
    """An expert that may have a vocabulary of its own.

    Attributes:
        name: its unique name.
        config: its own configuration, or for an adapter the base's.
        rows: how many rows its embeddings have.
    """

    name: str
    location: Location
    config: PretrainedConfig
    rows: int | None


def choose_tokenizer(
    tokenizer: str,
    base: Location,
    base_config: PretrainedConfig,
    experts: Sequence[Candidate],
    trust_remote_code: bool = False,
) -> TokenizerChoice:
    """Find the tokenizer that was asked for ("base", an expert's name or id, "union"), and align all models' tokens.

    Tokenizers are only read where their files differ from the base's, or the number of rows does. An expert without
    tokenizer files is taken to have the base's vocabulary.

    Raises:
        MergeError: if no such tokenizer is there, a tokenizer cannot be read, or vocabularies cannot be brought
            together.
    """
    chosen = find_chosen(tokenizer, [expert.name for expert in experts], [expert.location for expert in experts])
    location = base if chosen is None else experts[chosen].location
    if tokenizer != "base" and not tokenizer_files(location.folder):
        raise MergeError(
            f"tokenizer={tokenizer!r}, but {location} has no tokenizer files. Put them there, or choose another one."
        )
    choice = TokenizerChoice(location, chosen is not None)
    rows = vocabulary_size(base_config)
    own = [
        expert
        for expert in experts
        if tokenizer_files(expert.location.folder)
        and (expert.rows != rows or not _same_tokenizer_files(base, expert.location))
    ]
    if rows is None or not own:
        return choice

    problems = Problems()
    read = {
        expert.name: problems.attempt(
            partial(_read_vocabulary, expert.location, expert.config, expert.rows or rows, trust_remote_code)
        )
        for expert in own
    }
    if not tokenizer_files(base.folder):
        problems.report()
        _check_alike(base, rows, own, [vocabulary for vocabulary in read.values() if vocabulary])
        return choice
    ours = problems.attempt(partial(_read_vocabulary, base, base_config, rows, trust_remote_code))
    problems.report()
    assert ours is not None
    theirs = tuple(read.get(expert.name) or ours for expert in experts)
    if all(vocabulary == ours for vocabulary in theirs):
        return choice
    if tokenizer != "union":
        target = ours if chosen is None else theirs[chosen]
        return TokenizerChoice(location, choice.is_expert, alignment=Alignment(target, ours, theirs, chosen))
    merged, additions = _union(base, base_config, ours, own, trust_remote_code)
    return TokenizerChoice(base, additions=additions, alignment=Alignment(merged, ours, theirs))


def find_chosen(choice: str, names: Sequence[str], locations: Sequence[Location]) -> int | None:
    """The expert that a user means by its name or id; None for "base" and "union".

    Raises:
        MergeError: if there is none, or more than one.
    """
    if choice in ("base", "union"):
        return None
    if choice in names:
        return names.index(choice)
    found = [i for i, location in enumerate(locations) if _is_id(choice, location)]
    if len(found) != 1:
        raise MergeError(
            f'tokenizer={choice!r} is neither "base" nor "union", and names '
            f"{'several experts' if found else 'no expert'}. The experts' names are {', '.join(names)}."
        )
    return found[0]


def _is_id(choice: str, location: Location) -> bool:
    return choice == location.id or (location.commit is not None and choice.partition("@")[0] == location.id)


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


def load_tokenizer(location: Location, config: PretrainedConfig, trust_remote_code: bool) -> Any:
    """A model's tokenizer, from its own files alone.

    Raises:
        MergeError: if they are damaged, incomplete, or need code that is not trusted.
    """
    try:
        return AutoTokenizer.from_pretrained(
            location.folder, config=config, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # each tokenizer has its own ways to fail
        raise MergeError(
            f"The tokenizer files of {location} cannot be read ({type(error).__name__}: {error}). They are not those "
            "of the base, so the models' tokens must be compared: repair the files, or remove them if this model has "
            "the base's vocabulary."
        ) from error


def _read_vocabulary(location: Location, config: PretrainedConfig, rows: int, trust_remote_code: bool) -> Vocabulary:
    tokens = load_tokenizer(location, config, trust_remote_code).get_vocab()
    return Vocabulary({token: row for token, row in tokens.items() if row < rows}, rows)


def _same_tokenizer_files(a: Location, b: Location) -> bool:
    ours, theirs = (
        {path.name: path for path in tokenizer_files(location.folder) if not path.name.startswith("chat_template")}
        for location in (a, b)
    )
    return ours.keys() == theirs.keys() and all(filecmp.cmp(ours[name], theirs[name], shallow=False) for name in ours)


def _check_alike(base: Location, rows: int, experts: Sequence[Candidate], theirs: Sequence[Vocabulary]) -> None:
    """For a base without tokenizer files, whose vocabulary can only be the one that all experts have."""
    for expert, vocabulary in zip(experts, theirs, strict=True):
        if vocabulary.rows != rows or vocabulary.tokens != theirs[0].tokens:
            raise MergeError(
                f"The vocabularies differ: {expert.location} has {vocabulary.rows} rows and "
                f"{len(vocabulary.tokens)} tokens, {experts[0].location} has {len(theirs[0].tokens)}, and the base "
                f"{base} has {rows} rows and no tokenizer files, so that nobody knows its tokens. Put them there."
            )


def _union(
    base: Location, config: PretrainedConfig, ours: Vocabulary, experts: Sequence[Candidate], trust_remote_code: bool
) -> "tuple[Vocabulary, tuple[AddedToken, ...]]":
    """The base's vocabulary with the tokens that were added to the experts' tokenizers.

    The rows are those that the base's tokenizer gives to tokens that are added to it, in the order of the experts and
    of their rows: after its own tokens, in the base's padding first.
    """
    additions: dict[str, AddedToken] = {}
    for expert in experts:
        tokenizer = load_tokenizer(expert.location, expert.config, trust_remote_code)
        added = tokenizer.added_tokens_decoder
        vocabulary = tokenizer.get_vocab().items()
        rows = expert.rows or ours.rows
        new = {row: token for token, row in sorted(vocabulary) if row < rows and token not in ours.tokens}
        inner = [token for row, token in sorted(new.items()) if row not in added]
        if inner:
            raise MergeError(
                f"{expert.location} has {len(inner)} tokens that the base {base} lacks and that are part of its "
                f"tokenizer's own model ({', '.join(map(repr, inner[:SHOWN]))}, ...). They cannot be added to the "
                f"base's tokenizer, only tokens that were added to a tokenizer can. Use tokenizer={expert.name!r}."
            )
        for row, token in sorted(new.items()):
            additions.setdefault(token, added[row])
    tokenizer = extended_tokenizer(base, config, tuple(additions.values()), trust_remote_code)
    tokens = {token: row for token, row in tokenizer.get_vocab().items() if token in ours.tokens or token in additions}
    rows = max(ours.rows, *(tokens[token] + 1 for token in additions)) if additions else ours.rows
    return Vocabulary(tokens, rows), tuple(additions.values())


def extended_tokenizer(
    base: Location, config: PretrainedConfig, additions: "Sequence[AddedToken]", trust_remote_code: bool
) -> Any:
    """The base's tokenizer with tokens added."""
    tokenizer = load_tokenizer(base, config, trust_remote_code)
    for token in additions:
        tokenizer.add_tokens([token], special_tokens=token.special)
    return tokenizer
