"""Comparing the parameters of a model with the files that it was loaded from."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from neuromerge_hf.errors import MergeError
from neuromerge_hf.skeleton import Skeleton
from neuromerge_hf.storage.files import CHECKPOINT_FILES, find_weights
from neuromerge_hf.storage.formats import open_weights
from neuromerge_hf.storage.tensors import MERGEABLE, read_whole

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer dtype for each entry size in bytes."""


@dataclass(frozen=True)
class Changes:
    """How the parameters and buffers of a model compare with the files that it was loaded from.

    Attributes:
        changed: whether one differs from its stored value, or the model lacks one that is stored.
        added: whether the model has one that the files do not hold (a new head, a module that the user added).
            Those that its class never saves do not count.
    """

    changed: bool
    added: bool

    @property
    def is_equal(self) -> bool:
        """Whether the files hold the whole model as it is."""
        return not self.changed and not self.added


def compare(
    live: Mapping[str, Tensor],
    folder: Path,
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    *,
    is_quantised: bool = False,
) -> Changes:
    """Compare parameters and buffers with their stored values, after casting these to the live dtype.

    The files are read one parameter at a time, and reading stops at the first difference. Three kinds of tensors are
    not compared: quantised ones, those that accelerate keeps on disk (they cannot be trained), and those that the files
    do not hold. Of a sharded tensor, each process compares its own shard.

    Args:
        live: the model's state dict, by in-memory names, on any device.
        folder: the folder of the stored weights.
        model_class: the model's class.
        config: the stored configuration.
        is_quantised: whether transformers quantised the model. Some quantisers rename weights, so a stored parameter
            that the model lacks is then no change.

    Raises:
        MergeError: if the files are missing or damaged.
    """
    main = find_weights(folder, CHECKPOINT_FILES)
    if main is None:
        raise MergeError(f"{folder} has no weights any more. Merge the models again.")
    tensors = open_weights(main)
    skeleton = Skeleton(model_class, config)
    refs = {name: ref for name, ref in skeleton.refs(tensors).items() if ref is not None}
    stored_together: dict[str, list[str]] = defaultdict(list)
    for name, ref in refs.items():
        stored_together[ref.parameter].append(name)
    names_of: dict[str, list[str]] = defaultdict(list)
    for name in skeleton.shapes:
        names_of[skeleton.ties.get(name, name)].append(name)
    stored_names = {name for ref in refs.values() for parameter in ref.parameters for name in names_of[parameter]}
    added = not set(live) <= stored_names.union(skeleton.model._keys_to_ignore_on_save or ())
    for names in stored_together.values():
        read = {name: read_whole(tensors[name]) for name in names}
        for parameter, stored in skeleton.to_parameters(read, refs).items():
            found = [live[name] for name in names_of[parameter] if name in live]  # it may list tied ones once
            is_lacking = not found and not is_quantised
            if is_lacking or not all(_is_same(tensor, stored) for tensor in found):
                return Changes(True, added)
    return Changes(False, added)


def _is_same(live: Tensor, stored: Tensor) -> bool:
    if hasattr(live, "to_local"):
        live, stored = _local_shards(live, stored)
    is_quantised = type(live) not in (Tensor, torch.nn.Parameter) or (
        stored.dtype in MERGEABLE and live.dtype not in MERGEABLE
    )
    if is_quantised or live.is_meta:
        return True
    return live.shape == stored.shape and torch.equal(_bits(live), _bits(stored.to(live.dtype)))


def _local_shards(live: Any, stored: Tensor) -> tuple[Tensor, Tensor]:
    """This process's shard of a sharded tensor, and the same shard of the stored tensor."""
    from torch.distributed.tensor import distribute_tensor

    local: Tensor = live.to_local()
    if live.shape != stored.shape:
        return local, stored
    # Without a source rank nothing is sent: each process cuts its shard out of the tensor that it has read.
    part = distribute_tensor(stored, live.device_mesh, live.placements, src_data_rank=None)
    return local, part.to_local()


def _bits(tensor: Tensor) -> Tensor:
    """A tensor's bits as integers on the CPU. NaNs with the same bits compare equal."""
    return tensor.detach().cpu().view(INTEGERS[tensor.itemsize])
