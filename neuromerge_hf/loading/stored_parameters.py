"""The parameters of a model class in weight files, by their names in memory, without loading the model."""

from collections import defaultdict
from collections.abc import Iterator, Mapping

from torch import Tensor

from neuromerge_hf.skeleton import Skeleton
from neuromerge_hf.sources.checks import without_tied_copies
from neuromerge_hf.storage.tensors import StoredTensor, read_whole


class StoredParameters(Mapping[str, Tensor]):
    """The parameters and buffers that a checkpoint holds, each of which is read from its file when it is asked for.

    They have the values, names and shapes of a model that `from_pretrained` returns, tied ones under each name, and the
    dtypes of the files. Those that the files lack are not among them.

    Args:
        skeleton: the skeleton of the model's class.
        tensors: the tensors of the checkpoint by their names in its files.

    Raises:
        MergeError: if two copies of a tied parameter differ; when a parameter is read, if its file is damaged.
    """

    def __init__(self, skeleton: Skeleton, tensors: Mapping[str, StoredTensor]):
        self._skeleton = skeleton
        self._refs = {name: ref for name, ref in skeleton.refs(tensors).items() if ref is not None}
        self._tensors = without_tied_copies({name: tensors[name] for name in self._refs}, self._refs)
        stored_together: dict[str, list[str]] = defaultdict(list)
        for name in self._tensors:
            stored_together[self._refs[name].parameter].append(name)
        self._stored = {
            parameter: names
            for names in stored_together.values()
            for name in names
            for parameter in self._refs[name].parameters
        }

    def __getitem__(self, parameter: str) -> Tensor:
        owner = self._skeleton.ties.get(parameter, parameter)
        read = {name: read_whole(self._tensors[name]) for name in self._stored[owner]}
        return self._skeleton.to_parameters(read, self._refs)[owner]

    def __iter__(self) -> Iterator[str]:
        ties = self._skeleton.ties
        return (name for name in self._skeleton.shapes if ties.get(name, name) in self._stored)

    def __len__(self) -> int:
        return sum(1 for _ in self)
