"""Writes the blocks of a checkpoint straight to their places in its files, in any order."""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from neuromerge_hf.engine.hashing import FileHasher
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.formats import make_header
from neuromerge_hf.storage.layout import Block

HEADER = ""
"""The name of a file's header among the parts of a `FileHasher`. The other parts have the names of tensors."""


class CheckpointWriter:
    """Writes safetensors files whose headers are known beforehand. Any number of threads may call `write`.

    Attributes:
        hashes: the sha256 of each weight file by its name. It is empty until the files are closed, and stays empty if
            a unit is not finished or `hashed` is False.

    Args:
        folder: the folder for ``model.safetensors``, or for its shards and their index.
        units: the units to write.
        max_shard_size: the largest size of a file, as in transformers ("5GB").
        hashed: whether to compute the hashes, in the background while the files are written.
    """

    def __init__(self, folder: Path, units: Sequence[Unit], max_shard_size: str | int, *, hashed: bool = False):
        by_name = {unit.tensor.name: unit for unit in units}
        # As in safetensors' own files, wide dtypes come first, which keeps every tensor aligned.
        names = sorted(by_name, key=lambda name: (-by_name[name].dtype.itemsize, name))
        split = split_state_dict_into_shards_factory(
            {name: by_name[name] for name in names},
            get_storage_size=lambda unit: unit.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        self.hashes: dict[str, str] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._descriptors: list[int] = []
        self._pool = ThreadPoolExecutor(1, "hash") if hashed else None
        self._hashers: dict[str, FileHasher] = {}
        self._files = split.tensor_to_filename
        for file, in_file in split.filename_to_tensors.items():
            self._start(folder / file, [by_name[name] for name in in_file])
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _start(self, path: Path, units: list[Unit]) -> None:
        header, offsets, size = make_header({unit.tensor.name: (unit.dtype, unit.tensor.shape) for unit in units})
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._descriptors.append(descriptor)
        _pwrite(descriptor, memoryview(header), 0)
        os.truncate(descriptor, size)
        self._places |= {name: (descriptor, offset) for name, offset in offsets.items()}
        if self._pool:
            sizes = {unit.tensor.name: unit.nbytes for unit in units}
            hasher = FileHasher(descriptor, {HEADER: len(header), **sizes}, self._pool)
            hasher.finish(HEADER)
            self._hashers[path.name] = hasher

    def write(self, unit: Unit, block: Block, rows: Tensor) -> None:
        """Write a block of a unit from (neurons, width) rows of any dtype, on any device."""
        descriptor, offset = self._places[unit.tensor.name]
        stored = unit.layout.from_rows(rows.to("cpu", unit.dtype), block).contiguous()
        data = memoryview(stored.view(-1).view(torch.uint8).numpy().data)
        for start, stop in unit.layout.runs(block):
            size = (stop - start) * unit.dtype.itemsize
            _pwrite(descriptor, data[:size], offset + start * unit.dtype.itemsize)
            data = data[size:]

    def finish(self, unit: Unit) -> None:
        """Mark a unit as completely written. Only one thread may call this."""
        if self._hashers:
            self._hashers[self._files[unit.tensor.name]].finish(unit.tensor.name)

    def close(self) -> None:
        """Close the files. If every unit is finished, wait for the hashes first."""
        try:
            if self._pool:
                is_complete = all(hasher.is_complete for hasher in self._hashers.values())
                self._pool.shutdown(cancel_futures=not is_complete)  # a failed merge does not wait for hashes
                if is_complete:
                    self.hashes = {name: hasher.hexdigest() for name, hasher in self._hashers.items()}
        finally:
            while self._descriptors:
                os.close(self._descriptors.pop())


def _pwrite(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
