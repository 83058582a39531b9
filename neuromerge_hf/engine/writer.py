"""Writing a checkpoint in the order in which its blocks arrive, straight to their place in the files."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from neuromerge_hf.errors import MergeError
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.layout import Block
from neuromerge_hf.storage.tensors import DTYPES

SHARD_SIZE = re.compile(r"\s*\d+(\.\d+)?\s*[KMGT]B\s*", re.IGNORECASE)

FORMAT_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointWriter:
    """Writes safetensors files whose headers are known beforehand. Safe to use from any number of threads.

    Args:
        folder: where ``model.safetensors``, or its shards with their index, are made.
        units: what is written.
        max_shard_size: as in transformers ("5GB").
    """

    def __init__(self, folder: Path, units: Sequence[Unit], max_shard_size: str | int):
        by_name = {unit.tensor.name: unit for unit in units}
        # The format's own order, wide dtypes first, keeps every tensor aligned.
        names = sorted(by_name, key=lambda name: (-by_name[name].dtype.itemsize, name))
        split = split_state_dict_into_shards_factory(
            {name: by_name[name] for name in names},
            get_storage_size=lambda unit: unit.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        self._places: dict[str, tuple[int, int]] = {}
        self._descriptors: list[int] = []
        for file, in_file in split.filename_to_tensors.items():
            self._start(folder / file, [by_name[name] for name in in_file])
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _start(self, path: Path, units: list[Unit]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for unit in units:
            header[unit.tensor.name] = {
                "dtype": FORMAT_NAMES[unit.dtype],
                "shape": list(unit.tensor.shape),
                "data_offsets": [offset, offset + unit.nbytes],
            }
            offset += unit.nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._descriptors.append(descriptor)
        _pwrite(descriptor, memoryview(len(encoded).to_bytes(8, "little") + encoded), 0)
        os.truncate(descriptor, 8 + len(encoded) + offset)
        for unit in units:
            begin = header[unit.tensor.name]["data_offsets"][0]  # type: ignore[index]
            self._places[unit.tensor.name] = (descriptor, 8 + len(encoded) + begin)

    def write(self, unit: Unit, block: Block, rows: Tensor) -> None:
        """Write a block of a unit: (neurons, width) of any dtype, on any device."""
        descriptor, offset = self._places[unit.tensor.name]
        stored = unit.layout.from_rows(rows.to("cpu", unit.dtype), block).contiguous()
        data = memoryview(stored.view(-1).view(torch.uint8).numpy().data)
        for start, stop in unit.layout.runs(block):
            size = (stop - start) * unit.dtype.itemsize
            _pwrite(descriptor, data[:size], offset + start * unit.dtype.itemsize)
            data = data[size:]

    def close(self) -> None:
        """Close the files."""
        while self._descriptors:
            os.close(self._descriptors.pop())


def check_shard_size(max_shard_size: str | int) -> None:
    """Raise a `MergeError` if this is no size."""
    if isinstance(max_shard_size, str):
        is_size = SHARD_SIZE.fullmatch(max_shard_size) is not None
    else:
        is_size = isinstance(max_shard_size, int) and max_shard_size > 0
    if not is_size:
        raise MergeError(f'max_shard_size must be a size such as "5GB", or a number of bytes, not {max_shard_size!r}.')


def _pwrite(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
