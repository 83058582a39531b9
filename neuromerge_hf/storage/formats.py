"""Opening weight files: safetensors and pickles, single files and sharded checkpoints; and headers of new files."""

import json
import math
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from neuromerge_hf.errors import MergeError
from neuromerge_hf.storage.files import weight_files
from neuromerge_hf.storage.tensors import (
    DTYPES,
    FORMAT_NAMES,
    PickledTensor,
    SafetensorsFile,
    SafetensorsTensor,
    StoredTensor,
)

OPEN_THREADS = 8
"""How many files are opened at once. Opening a file on the Hub means waiting for its header."""


def open_file(path: Path) -> Mapping[str, StoredTensor]:
    """Open the tensors of one weight file by name.

    Raises:
        MergeError: if the file is truncated or damaged.
    """
    return open_safetensors(path) if path.suffix == ".safetensors" else open_pickle(path)


def open_weights(
    main: Path,
    is_file: Callable[[Path], bool] = Path.is_file,
    open_file: Callable[[Path], Mapping[str, StoredTensor]] = open_file,
) -> dict[str, StoredTensor]:
    """Open the tensors of a checkpoint or adapter by name, in the order of the files, from their headers alone.

    Args:
        main: a weight file or an index, see `find_weights`.
        is_file: tells whether a file exists, on this machine or on the Hub.
        open_file: opens one file. It is called on several threads.

    Raises:
        MergeError: if a file is missing, truncated or damaged.
    """
    tensors: dict[str, StoredTensor] = {}
    with ThreadPoolExecutor(OPEN_THREADS) as pool:
        for opened in pool.map(open_file, weight_files(main, is_file)):
            tensors.update(opened)
    if main.name.endswith(".index.json"):
        missing = sorted(set(json.loads(main.read_text())["weight_map"]) - set(tensors))
        if missing:
            raise MergeError(
                f"{main} lists the tensor {missing[0]}{_more(missing)}, but its file does not hold it. "
                "Download the model again."
            )
    return tensors


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


MAX_HEADER = 100_000_000
"""The size in bytes to which the safetensors format limits a header."""


def open_safetensors(path: Path) -> dict[str, SafetensorsTensor]:
    """Open the tensors of a safetensors file by name, from its header alone.

    Raises:
        MergeError: if the file is truncated or is not a safetensors file.
    """
    opened = SafetensorsFile(path)
    with path.open("rb") as file:
        header = read_header(
            path, path.stat().st_size, lambda start, stop: os.pread(file.fileno(), stop - start, start)
        )
    return {
        name: SafetensorsTensor(name, dtype, shape, opened, offset) for name, (dtype, shape, offset) in header.items()
    }


def read_header(
    path: Path, size: int, read: Callable[[int, int], bytes]
) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
    """Read the header of a safetensors file.

    Args:
        path: the file, for messages.
        size: the size of the file in bytes.
        read: returns the bytes [start, stop) of the file. It is called for the first 8 bytes, then for the header.

    Returns:
        The dtype, the shape and the position of the first byte in the file, by tensor name.

    Raises:
        MergeError: if the file is truncated or is not a safetensors file.
    """
    try:
        if size < 8:
            raise _truncated(path, size, "the length of its header alone has 8")
        start = read(0, 8)
        data = 8 + int.from_bytes(start, "little")
        if data - 8 > MAX_HEADER:
            raise ValueError(f"it starts with {start!r}, like a web page or a pointer of Git LFS")
        if data > size:
            raise _truncated(path, size, f"its header should have {data - 8} bytes")
        header = json.loads(read(8, data))
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            if end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"tensor {name} has {end - begin} bytes, not those of {dtype} {shape}")
            if data + end > size:
                raise _truncated(path, size, f"tensor {name} should end at byte {data + end}")
            tensors[name] = dtype, shape, data + begin
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, MergeError):
            raise
        raise MergeError(f"{path} is not a valid safetensors file ({error}). Download or save it again.") from error
    return tensors


def make_header(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
) -> tuple[bytes, dict[str, int], int]:
    """Make the header of a safetensors file.

    Args:
        tensors: the dtype and the shape of each tensor, in the order in which the file holds them.

    Returns:
        The bytes before the first tensor, the position of each tensor's first byte in the file, and the file's size.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begins[name] = begin = end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": FORMAT_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    data = 8 + len(encoded)
    offsets = {name: data + begin for name, begin in begins.items()}
    return len(encoded).to_bytes(8, "little") + encoded, offsets, data + end


def _truncated(path: Path, size: int, expectation: str) -> MergeError:
    return MergeError(f"{path} is truncated: it has {size} bytes, but {expectation}. Download or copy it again.")


def open_pickle(path: Path) -> dict[str, PickledTensor]:
    """Open the tensors of a ``.bin`` file by name, with ``weights_only=True``, so that nothing in it is executed.

    Raises:
        MergeError: if the file is damaged, or holds anything but tensors.
    """
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # Files of torch < 1.6 cannot be mapped into memory.
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise MergeError(
            f"{path} is damaged or holds more than tensors, and torch.load(weights_only=True) refuses it; nothing in "
            "it was executed. Download it again, or save the model as safetensors."
        ) from error
    except Exception as error:  # torch.load documents no exception types
        raise MergeError(
            f"{path} cannot be read ({type(error).__name__}: {str(error).partition('. ')[0]}). "
            "It may be truncated: download or save it again."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise MergeError(f"{path} is not a state dict of tensors. Save the model again, with save_pretrained.")
    return {name: PickledTensor(name, tensor, path) for name, tensor in state.items()}
