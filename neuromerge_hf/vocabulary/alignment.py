"""Alignment of the opened base and experts to one vocabulary."""

import copy
import dataclasses
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from transformers import PretrainedConfig

from neuromerge_hf.errors import MergeError
from neuromerge_hf.skeleton import ParameterRef, Skeleton, skeleton_of
from neuromerge_hf.sources.aligned import AlignedTensor, AlignedVector
from neuromerge_hf.sources.base import Base
from neuromerge_hf.sources.expert import Expert
from neuromerge_hf.sources.heads import Head
from neuromerge_hf.sources.task_vector import Difference, TaskVector
from neuromerge_hf.storage.files import tokenizer_files
from neuromerge_hf.storage.layout import Layout
from neuromerge_hf.storage.location import Location
from neuromerge_hf.vocabulary.token_ids import renumber_config
from neuromerge_hf.vocabulary.vocabulary import Alignment, resized, vocabulary_size


def comparable_skeleton(
    base: Skeleton, base_location: Location, expert: Location, config: PretrainedConfig
) -> Skeleton:
    """The base's skeleton, with the expert's vocabulary size if both have tokenizer files to align them by."""
    rows = vocabulary_size(config)
    readable = tokenizer_files(base_location.folder) and tokenizer_files(expert.folder)
    if rows is None or rows == vocabulary_size(base.model.config) or not readable:
        return base
    return skeleton_of(base.model_class, resized(base.model.config, rows), base.most)


def expert_rows(location: Location, config: PretrainedConfig, base: Base) -> int | None:
    """The number of rows of a full checkpoint's embeddings; None without a vocabulary.

    Raises:
        MergeError: if its configuration has more rows than any tensor. Much memory would be taken for them.
    """
    rows, main = vocabulary_size(config), location.find_weights()
    if rows is None or rows == vocabulary_size(base.config) or main is None:
        return rows
    try:
        tensors = location.open_weights(main)
    except MergeError:  # opening the expert reports it
        return None
    longest = max((max(tensor.shape, default=0) for tensor in tensors.values()), default=0)
    if rows > longest:
        raise MergeError(
            f"{location.folder / 'config.json'} has vocab_size {rows}, but no tensor of {main} has so many rows: the "
            f"longest has {longest}. Save or download the model again."
        )
    return rows


def adapter_rows(location: Location, base: Base) -> int | None:
    """The number of rows of an adapter's embeddings, or of the base's if it stores none; None without a vocabulary."""
    rows = vocabulary_size(base.config)
    main = location.find_weights()
    if main is None or rows is None or not tokenizer_files(location.folder):
        return rows
    modules = [name.rpartition(".")[0] for name in vocabulary_parameters(base.skeleton)]
    for key, tensor in location.open_weights(main).items():
        stored = key.removesuffix(".weight").removesuffix(".base_layer").removesuffix(".modules_to_save")
        if key.endswith(".weight") and any(module and stored.endswith(f".{module}") for module in modules):
            return tensor.shape[0]
    return rows


def vocabulary_parameters(skeleton: Skeleton) -> set[str]:
    """The names of the parameters that have a row for each token, which are those that grow with the vocabulary.

    Raises:
        MergeError: if a parameter has its tokens along another axis than the first.
    """
    rows = vocabulary_size(skeleton.model.config)
    if rows is None:
        return set()
    larger = skeleton_of(skeleton.model_class, resized(skeleton.model.config, rows + 1)).shapes
    found = set()
    for name, shape in skeleton.shapes.items():
        growing = [axis for axis, size in enumerate(shape) if larger[name][axis] != size]
        if not growing:
            continue
        if len(growing) > 1 or prod(shape[: growing[0]]) > 1 or shape[growing[0]] != rows:
            raise MergeError(
                f"The vocabularies differ, and {name} {shape} has no row for each token, so that it cannot be aligned. "
                "Give all models the same tokenizer."
            )
        found.add(skeleton.ties.get(name, name))
    return found


def resized_base(base: Base, rows: int | None) -> Base:
    """The base with its embeddings cut, or padded with zeros, to this many rows; None leaves the base unchanged."""
    own = vocabulary_size(base.config)
    if rows is None or own is None or rows == own:
        return base
    numbers = torch.arange(rows)
    return _with_rows(
        base, {name: AlignedRows(numbers.where(numbers < own, -1)) for name in _vocabulary_refs(base)}, rows
    )


@dataclasses.dataclass(frozen=True)
class AlignedRows:
    """The rows of a base tensor in the order of another vocabulary; the attributes are those of `AlignedTensor`."""

    rows: Tensor
    experts: tuple[AlignedVector, ...] = ()


def align(
    base: Base, experts: Sequence[Expert], alignment: Alignment, weights: Sequence[float]
) -> tuple[Base, list[Expert]]:
    """Bring the rows of all vocabulary parameters of the base and the experts into the order of the target.

    A row that the base lacks becomes the mean over the experts that have it. An expert has a task vector only in the
    rows of tokens that both it and the base have.

    Args:
        base: the base.
        experts: the experts.
        alignment: the vocabularies of all models and of the target.
        weights: the weight of each expert in the mean.

    Raises:
        MergeError: if an expert's embeddings cannot be read in another order, or no model has a row for a token.
    """
    problems: list[str] = []
    aligned: dict[str, AlignedRows] = {}
    vectors: list[dict[ParameterRef, TaskVector]] = [dict(expert.task_vectors) for expert in experts]
    base_rows = alignment.base_rows
    expert_rows = [alignment.expert_rows(number) for number in range(len(experts))]
    numbers = torch.arange(alignment.target.rows)
    for name, ref in _vocabulary_refs(base).items():
        given: list[AlignedVector] = []
        for number, expert in enumerate(experts):
            rows = expert_rows[number]
            vector = expert.task_vectors.get(ref)
            layout = _layout(base, name, alignment.experts[number].rows)
            if expert.is_adapter and not _is_stored(vector):
                moved = (rows >= 0) & (base_rows >= 0) & (rows != base_rows)
                new = (rows >= 0) & (base_rows < 0)
                if moved.any() or (vector and new.any()):
                    token = alignment.target.texts.get(int((moved | new).nonzero()[0]), "padding")
                    problems.append(_not_stored(expert, ref, token))
                if vector is None:  # its new tokens use the base's padding, which it leaves unchanged
                    vector = Difference(base.tensors[name], layout)
                    own = rows.where(new & (rows < alignment.base.rows), -1)
                    given.append(AlignedVector(vector, layout, own, weights[number]))
                    continue
            if vector is None:
                continue
            if not torch.equal(rows, numbers) or not torch.equal(base_rows, numbers):
                vectors[number][ref] = AlignedVector(vector, layout, rows.where(base_rows >= 0, -1))
                given.append(AlignedVector(vector, layout, rows.where(base_rows < 0, -1), weights[number]))
        lacking = base_rows < 0
        for source in given:
            lacking &= source.rows < 0
        if lacking.any():
            row = int(lacking.nonzero()[0])
            text = alignment.target.texts.get(row)
            what = f"the token {text!r}" if text else f"the padding in row {row}"
            problems.append(
                f"The base {base.location} lacks {what}, and no expert that has it stores {ref.parameter}. "
                'Choose tokenizer="base".'
            )
        aligned[name] = AlignedRows(base_rows, tuple(source for source in given if (source.rows >= 0).any()))
    if problems:
        raise MergeError(problems)
    new_experts = [
        dataclasses.replace(expert, task_vectors=changed, head=_aligned_head(expert, number, alignment))
        for number, (expert, changed) in enumerate(zip(experts, vectors, strict=True))
    ]
    return _with_rows(base, aligned, alignment.target.rows), new_experts


def _vocabulary_refs(base: Base) -> dict[str, ParameterRef]:
    """The parameters of the base's stored vocabulary tensors, by the tensors' names in the file."""
    parameters = vocabulary_parameters(base.skeleton)
    return {
        name: ref
        for name, ref in base.refs.items()
        if name in base.tensors and ref is not None and ref.parameter in parameters
    }


def _layout(base: Base, name: str, rows: int) -> Layout:
    """The layout of a vocabulary parameter with another number of rows."""
    layout = base.layouts[name]
    if layout is None:
        return Layout.of((rows,), None)
    return dataclasses.replace(layout, neurons=rows)


def _with_rows(base: Base, aligned: dict[str, AlignedRows], rows: int) -> Base:
    config = resized(base.config, rows)
    tensors, layouts = dict(base.tensors), dict(base.layouts)
    own = vocabulary_size(base.config)
    for name, found in aligned.items():
        tensor = tensors[name]
        axis = tensor.shape.index(own)
        shape = *tensor.shape[:axis], rows, *tensor.shape[axis + 1 :]
        tensors[name] = AlignedTensor(tensor, shape, found.rows, found.experts)
        layouts[name] = _layout(base, name, rows) if layouts[name] else None
    skeleton = skeleton_of(base.skeleton.model_class, config)
    return dataclasses.replace(base, config=config, skeleton=skeleton, tensors=tensors, layouts=layouts)


def _is_stored(vector: TaskVector | None) -> bool:
    """Whether a task vector comes from weights that the expert stores whole."""
    return isinstance(getattr(vector, "stored", vector), Difference)


def _not_stored(expert: Expert, ref: ParameterRef, token: str) -> str:
    return (
        f"{expert.location} does not store {ref.parameter} whole, so that its rows are those of its base, but "
        f"its tokenizer puts the token {token!r} on another row. Save the adapter with save_embedding_layers=True, "
        "or remove its tokenizer files if it has the base's vocabulary."
    )


def _aligned_head(expert: Expert, number: int, alignment: Alignment) -> Head | None:
    """An expert's own head, with its configuration converted to the merged vocabulary.

    Raises:
        MergeError: if the head has a row for each of the expert's tokens, and the merged model has other tokens.
    """
    if expert.head is None:
        return None
    vocabulary = alignment.experts[number]
    if vocabulary != alignment.target:
        for name, tensor in expert.head.tensors.items():
            if vocabulary.rows in tensor.shape:
                raise MergeError(
                    f"{expert.location} has a head of its own with a row for each of its tokens ({name} "
                    f"{tensor.shape}), but the merged model has another vocabulary. Use "
                    f"tokenizer={expert.name!r}, or leave the head out of the expert."
                )
    config = renumber_config(copy.deepcopy(expert.head.config), vocabulary, alignment)
    return dataclasses.replace(expert.head, config=resized(config, alignment.target.rows))
