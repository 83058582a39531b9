"""Conversion between the tensors of a checkpoint and the parameters of a model, in both directions.

Checkpoints and models can differ in names (prefixes, old names) and in form (experts stored one by one; query, key and
value in one tensor). This is the only module that uses transformers' conversion of checkpoints, which is half private.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from neuromerge_hf.errors import MergeError

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class ParameterRef:
    """The parameter that a checkpoint's tensor holds.

    Attributes:
        parameter: the name of the parameter in memory; the first of its names if it is tied.
        piece: the tensor's own name after prefixes and renamings, if the checkpoint stores the parameter in a converted
            form (for example, fused experts one by one); None if the tensor is the parameter itself.
        also: further parameters in the same stored tensor (for example, key and value beside the query).
        pattern: transformers' name pattern of the conversion; None if there is no conversion.
    """

    parameter: str
    piece: str | None = None
    also: tuple[str, ...] = ()
    pattern: str | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        """All parameters that the tensor holds or is a piece of."""
        return (self.parameter, *self.also)


StoredForm: TypeAlias = Mapping[str, tuple[ParameterRef, Shape]]
"""The parameter and the shape of each stored tensor, by its name in the checkpoint."""


class Conversions:
    """The conversion that transformers applies to a checkpoint when it loads a model, and reverses when it saves one.

    Args:
        model: the model on the meta device.
        shapes: the shapes of its parameters and buffers, by their names in memory.
        ties: the tied parameters, each with the name of the parameter whose weights it shares.
    """

    def __init__(self, model: PreTrainedModel, shapes: Mapping[str, Shape], ties: Mapping[str, str]):
        self._config = model.config
        self._prefix = model.base_model_prefix
        self._shapes = dict(shapes)
        self._ties = ties
        self._mapping = get_model_conversion_mapping(model)

    def refs(self, names: Iterable[str]) -> dict[str, ParameterRef | None]:
        """The parameter that each tensor of a checkpoint or an adapter holds; None if the model does not have it."""
        mapping = copy.deepcopy(self._mapping)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        # Some of transformers' renamings keep a state, so names must come in its order.
        return {name: self._ref(name, renamings, converters) for name in sorted(names, key=dot_natural_key)}

    def _ref(
        self, name: str, renamings: list[WeightRenaming], converters: list[WeightConverter]
    ) -> ParameterRef | None:
        parameter, pattern = rename_source_key(name, renamings, converters, self._prefix, self._shapes)
        if parameter not in self._shapes and name in self._shapes:
            parameter, pattern = rename_source_key(name, [], [], self._prefix, self._shapes)
        if parameter not in self._shapes:
            return None
        parameter = self._ties.get(parameter, parameter)
        if pattern is None:
            return ParameterRef(parameter)
        piece, _ = rename_source_key(name, renamings, [])
        first, *others = self._converters(pattern)[0].target_patterns
        also = tuple(parameter.replace(first, other) for other in others)
        return ParameterRef(parameter, piece.removeprefix(f"{self._prefix}."), also, pattern)

    def to_parameters(
        self,
        tensors: Mapping[str, Tensor],
        refs: Mapping[str, ParameterRef],
        shapes: Mapping[str, Shape] | None = None,
    ) -> dict[str, Tensor]:
        """Convert a checkpoint's tensors to parameters. Values are moved, never computed.

        Args:
            tensors: the tensors by their names in the checkpoint, with all pieces of each parameter, on any device.
            refs: the parameter that each tensor holds.
            shapes: the shapes of the parameters; None for those of the model.

        Returns:
            The parameters by their names in memory.

        Raises:
            MergeError: if transformers cannot put the pieces together.
        """
        parameters = {}
        converters: dict[str, WeightConverter] = {}
        for name in sorted(tensors, key=dot_natural_key):
            ref = refs[name]
            if ref.pattern is None:
                parameters[ref.parameter] = tensors[name]
                continue
            if ref.parameter not in converters:
                converters[ref.parameter] = copy.deepcopy(self._converters(ref.pattern)[0])
            _collect(converters[ref.parameter], ref.pattern, tensors[name])
        for parameter, converter in converters.items():
            parameters |= self._convert(converter, parameter, shapes or self._shapes)
        return parameters

    def to_stored(self, parameters: Mapping[str, Tensor], form: StoredForm) -> dict[str, Tensor]:
        """Convert parameters to the form in which a checkpoint stores them: the reverse of `to_parameters`.

        Args:
            parameters: all parameters that the tensors of `form` hold, by their names in memory, on any device.
            form: the tensors to make, with all pieces of each parameter.

        Returns:
            The tensors by their names in the checkpoint. They may share memory with `parameters`.

        Raises:
            MergeError: if transformers cannot convert back exactly.
        """
        stored = {name: parameters[ref.parameter] for name, (ref, _) in form.items() if ref.pattern is None}
        groups: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
        for name, (ref, _) in form.items():
            if ref.piece is not None:
                groups[ref.parameters][ref.piece] = name
        for group, names in groups.items():
            stored |= self._reverted({name: parameters[name] for name in group}, names, form)
        return stored

    def _reverted(self, parameters: dict[str, Tensor], names: dict[str, str], form: StoredForm) -> dict[str, Tensor]:
        """Convert parameters that share stored tensors. `names` maps each piece to its name in the checkpoint."""
        refs = {name: form[name][0] for name in names.values()}
        pattern = next(iter(refs.values())).pattern
        assert pattern is not None
        shapes = {piece: form[name][1] for piece, name in names.items()}
        shapes |= {f"{self._prefix}.{piece}": shape for piece, shape in shapes.items()}
        first, *_ = parameters
        reverse, renamed = self._reverse(pattern, list(parameters))
        for parameter, tensor in parameters.items():
            _collect(reverse, reverse.rename_source_key(parameter)[1], tensor)
        converted = self._convert(reverse, renamed, shapes)
        pieces = {key.removeprefix(f"{self._prefix}."): tensor for key, tensor in converted.items()}
        if {key: tuple(tensor.shape) for key, tensor in pieces.items()} != {key: shapes[key] for key in names}:
            raise MergeError(_cannot_convert(first, "its reverse makes other tensors"))
        stored = {names[piece]: tensor for piece, tensor in pieces.items()}
        again = self.to_parameters(stored, refs)
        if not all(_same_bits(again[name], tensor) for name, tensor in parameters.items()):
            raise MergeError(_cannot_convert(first, "its reverse makes other values"))
        return stored

    def _reverse(self, pattern: str, parameters: list[str]) -> tuple[WeightConverter, str]:
        """The reverse of the conversion with this pattern, and its name for the first of the parameters."""
        for converter in self._converters(pattern):
            try:
                reverse: Any = converter.reverse_transform()
            except Exception as error:  # the operations document no exceptions
                raise MergeError(_cannot_convert(parameters[0], repr(error))) from error
            renamed = [reverse.rename_source_key(parameter) for parameter in parameters]
            if all(source is not None for _, source in renamed):
                return reverse, renamed[0][0]
        raise MergeError(_cannot_convert(parameters[0], "it has no reverse"))

    def _converters(self, pattern: str) -> list[WeightConverter]:
        return [
            entry for entry in self._mapping if isinstance(entry, WeightConverter) and pattern in entry.source_patterns
        ]

    def _convert(self, converter: WeightConverter, name: str, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
        model: Any = _Shapes(shapes)
        try:
            converted = converter.convert(name, model=model, config=self._config)
        except Exception as error:  # the operations document no exceptions
            raise MergeError(_cannot_convert(name, repr(error))) from error
        return {key: tensor[0] if isinstance(tensor, list) else tensor for key, tensor in converted.items()}


class _Shapes:
    """A stand-in for the model, of which a conversion only reads the shapes of its results."""

    def __init__(self, shapes: Mapping[str, Shape]):
        self._shapes = shapes

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty(self._shapes[name], device="meta")


def _collect(converter: WeightConverter, pattern: str | None, tensor: Tensor) -> None:
    collected: Any = converter.collected_tensors  # annotated as futures, which only loading needs
    collected[pattern].append(tensor)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.is_meta:
        return a.shape == b.shape and a.dtype == b.dtype
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _cannot_convert(name: str, why: str) -> str:
    return (
        f"transformers cannot convert {name} between the forms in which checkpoints store it: {why}. Load the base and "
        "the expert with transformers (from_pretrained), save both again (save_pretrained), and merge those."
    )
