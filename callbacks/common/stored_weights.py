"""The weights of a merge as a model in training would load them, read one at a time."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from neuromerge_hf.errors import MergeError
from neuromerge_hf.skeleton import ParameterRef, Skeleton
from neuromerge_hf.sources.checks import same_values
from neuromerge_hf.storage.files import HEAD_WEIGHTS, HEADS
from neuromerge_hf.storage.location import locate
from neuromerge_hf.storage.tensors import StoredTensor, read_whole


class StoredWeights(Mapping[str, Tensor]):
    """The parameters of a merged model, by their names in a model class. Each is read when it is asked for.

    Parameters that the merge does not have, such as an untrained head, are not in the mapping. A value is on the CPU,
    in the dtype of the file, and nothing keeps it.

    Args:
        folder: the folder of the merge.
        head: the name of the expert whose head belongs to the weights, if it has one of its own.
        model_class: the class of the model.
        config: its configuration.

    Raises:
        MergeError: if the merge has no weights, or has untied what a model of this class ties.
    """

    def __init__(self, folder: Path, head: str, model_class: type[PreTrainedModel], config: PretrainedConfig):
        self._skeleton = Skeleton(model_class, config)
        location = locate(folder)
        main = location.find_weights()
        if main is None:
            raise MergeError(f"{folder} has no weights. Merge the models again.")
        self._tensors: dict[str, StoredTensor] = location.open_weights(main)
        own = folder / HEADS / head
        if own.is_dir():
            self._tensors |= locate(own).open_weights(own / HEAD_WEIGHTS)
        refs = self._skeleton.refs(self._tensors)
        self._refs = {name: ref for name, ref in refs.items() if ref is not None}
        self._stored: dict[str, list[str]] = defaultdict(list)
        for name, ref in self._refs.items():
            for parameter in ref.parameters:
                self._stored[parameter].append(name)
        for parameter, names in self._stored.items():
            self._check_tied(parameter, [name for name in names if self._refs[name] == ParameterRef(parameter)])

    def __getitem__(self, name: str) -> Tensor:
        owner = self._skeleton.ties.get(name, name)
        if owner not in self._stored:
            raise KeyError(name)
        stored = self._stored[owner]
        if self._refs[stored[0]].pattern is None:
            return read_whole(self._tensors[stored[0]])
        tensors = {each: read_whole(self._tensors[each]) for each in stored}
        return self._skeleton.to_parameters(tensors, self._refs)[owner]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._skeleton.shapes if self._skeleton.ties.get(name, name) in self._stored)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _check_tied(self, parameter: str, names: list[str]) -> None:
        if all(same_values(self._tensors[names[0]], self._tensors[name]) for name in names[1:]):
            return
        copy = next(name for name, owner in self._skeleton.ties.items() if owner == parameter)
        raise MergeError(
            "The model in training cannot hold the merged weights to evaluate them: it has one tensor for "
            f"{parameter} and {copy}, which the merge has untied."
        )
