"""The choice of the merged model's tokenizer, and the comparison of the models' vocabularies."""

import filecmp
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, PretrainedConfig

from neuromerge_hf.errors import MergeError, Problems
from neuromerge_hf.storage.documents import load_json, read_text
from neuromerge_hf.storage.files import tokenizer_files
from neuromerge_hf.storage.location import Location
from neuromerge_hf.vocabulary.vocabulary import Alignment, Vocabulary, vocabulary_size

if TYPE_CHECKING:
    from tokenizers import AddedToken

SHOWN = 3
"""How many tokens an error message lists."""


@dataclass(frozen=True)
class TokenizerChoice:
    """The source of the merged model's tokenizer.

    Attributes:
        location: the model whose tokenizer is taken.
        is_expert: whether this model is an expert rather than the base.
        additions: the tokens to add to the tokenizer.
        chat_template: the chat template to write; None for the tokenizer's own.
        alignment: how the vocabularies are aligned; None if all models have the same vocabulary.
    """

    location: Location
    is_expert: bool = False
    additions: "tuple[AddedToken, ...]" = ()
    alignment: Alignment | None = None
    chat_template: str | None = None

    @property
    def has_files(self) -> bool:
        """Whether this model has tokenizer files."""
        return bool(tokenizer_files(self.location.folder))


@dataclass(frozen=True)
class ExpertVocabulary:
    """An expert whose vocabulary may differ from the base's.

    Attributes:
        name: the unique name of the expert.
        config: the expert's configuration; the base's if the expert is an adapter.
        rows: the number of rows of the expert's embeddings; None if it has no vocabulary.
    """

    name: str
    location: Location
    config: PretrainedConfig
    rows: int | None


def choose_tokenizer(
    tokenizer: str,
    chat_template: str | None,
    base: Location,
    base_config: PretrainedConfig,
    experts: Sequence[ExpertVocabulary],
    trust_remote_code: bool = False,
) -> TokenizerChoice:
    """Find the requested tokenizer and chat template, and align the tokens of all models.

    An expert's tokenizer is only read if its files or its number of rows differ from the base's. An expert without
    tokenizer files is assumed to have the base's vocabulary.

    Args:
        tokenizer: "base", an expert's name or id, or "union".
        chat_template: "base", or an expert's name or id; None for the tokenizer's own.

    Raises:
        MergeError: if the tokenizer or the template does not exist, a tokenizer cannot be read, or the vocabularies
            cannot be aligned.
    """
    chosen = None if tokenizer in ("base", "union") else _find("tokenizer", tokenizer, experts)
    location = base if chosen is None else experts[chosen].location
    if tokenizer != "base" and not tokenizer_files(location.folder):
        raise MergeError(
            f"tokenizer={tokenizer!r}, but {location} has no tokenizer files. Put them there, or choose another one."
        )
    template = None
    if chat_template is not None:
        number = None if chat_template == "base" else _find("chat_template", chat_template, experts)
        template = read_chat_template(base if number is None else experts[number].location)
    choice = TokenizerChoice(location, chosen is not None, chat_template=template)
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
        _check_same_vocabulary(base, rows, own, [vocabulary for vocabulary in read.values() if vocabulary])
        return choice
    ours = problems.attempt(partial(_read_vocabulary, base, base_config, rows, trust_remote_code))
    problems.report()
    assert ours is not None
    theirs = tuple(read.get(expert.name) or ours for expert in experts)
    if all(vocabulary == ours for vocabulary in theirs):
        return choice
    if tokenizer != "union":
        target = ours if chosen is None else theirs[chosen]
        return replace(choice, alignment=Alignment(target, ours, theirs, chosen))
    merged, additions = _union(base, base_config, ours, own, trust_remote_code)
    return replace(choice, additions=additions, alignment=Alignment(merged, ours, theirs))


def _find(option: str, choice: str, experts: Sequence[ExpertVocabulary]) -> int:
    """The number of the expert with this name or id."""
    names = [expert.name for expert in experts]
    if choice in names:
        return names.index(choice)
    found = [number for number, expert in enumerate(experts) if _is_id(choice, expert.location)]
    if len(found) != 1:
        others = '"base", "union"' if option == "tokenizer" else '"base"'
        raise MergeError(f"{option} must be {others} or the name of one expert ({', '.join(names)}), not {choice!r}.")
    return found[0]


def _is_id(choice: str, location: Location) -> bool:
    return choice == location.id or (location.commit is not None and choice.partition("@")[0] == location.id)


def read_chat_template(location: Location) -> str:
    """Read a model's chat template.

    Raises:
        MergeError: if the model has no chat template, or several.
    """
    path = location.folder / "chat_template.jinja"
    if path.is_file():
        return read_text(path)
    path = location.folder / "tokenizer_config.json"
    template = load_json(path).get("chat_template") if path.is_file() else None
    if not isinstance(template, str):
        raise MergeError(
            f"{location} has {'several chat templates' if template else 'no chat template'} in chat_template.jinja or "
            "tokenizer_config.json. Choose another model's, or leave chat_template out."
        )
    return template


def load_tokenizer(location: Location, config: PretrainedConfig, trust_remote_code: bool) -> Any:
    """Load a model's tokenizer from the files in its folder.

    Raises:
        MergeError: if the files are damaged or incomplete, or need code that is not trusted.
    """
    try:
        return AutoTokenizer.from_pretrained(
            location.folder, config=config, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # tokenizers document no exceptions
        raise MergeError(
            f"The tokenizer files of {location} cannot be read ({type(error).__name__}: {error}). The models' "
            "tokenizers differ, so their tokens must be compared: repair the files, or remove them from an expert that "
            "has the base's vocabulary."
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


def _check_same_vocabulary(
    base: Location, rows: int, experts: Sequence[ExpertVocabulary], theirs: Sequence[Vocabulary]
) -> None:
    """Check that all experts have one vocabulary, which then is the vocabulary of a base without tokenizer files."""
    for expert, vocabulary in zip(experts, theirs, strict=True):
        if vocabulary.rows != rows or vocabulary.tokens != theirs[0].tokens:
            raise MergeError(
                f"The vocabularies differ: {expert.location} has {vocabulary.rows} rows and "
                f"{len(vocabulary.tokens)} tokens, {experts[0].location} has {len(theirs[0].tokens)}, and the base "
                f"{base} has {rows} rows and no tokenizer files, so that nobody knows its tokens. Put them there."
            )


def _union(
    base: Location,
    config: PretrainedConfig,
    ours: Vocabulary,
    experts: Sequence[ExpertVocabulary],
    trust_remote_code: bool,
) -> "tuple[Vocabulary, tuple[AddedToken, ...]]":
    """The base's vocabulary with the tokens that were added to the experts' tokenizers, and these tokens.

    The base's tokenizer numbers the added tokens in the order of the experts and of their rows. They follow its own
    tokens, so they use the base's padding first.
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
    """The base's tokenizer with further tokens added."""
    tokenizer = load_tokenizer(base, config, trust_remote_code)
    for token in additions:
        tokenizer.add_tokens([token], special_tokens=token.special)
    return tokenizer
