"""Opening weight files: safetensors and pickles, single files and sharded checkpoints; and headers of new files."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from neuromerge_hf.errors import MergeError
from neuromerge_hf.storage.files import weight_files, weight_map
from neuromerge_hf.storage.pickles import open_pickle
from neuromerge_hf.storage.tensors import (
    DTYPES,
    FORMAT_NAMES,
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
    notes: list[str] | None = None,
) -> dict[str, StoredTensor]:
    """Open the tensors of a checkpoint or adapter by name, in the order of the files, from their headers alone.

    Of a tensor that several shards hold, the one in the shard that the index names is opened. As in transformers,
    shards that the index does not list are not opened, but all tensors of the others are.

    Args:
        main: a weight file or an index, see `find_weights`.
        is_file: tells whether a file exists, on this machine or on the Hub.
        open_file: opens one file. It is called on several threads.
        notes: to which a remark is added if several shards hold the same tensor.

    Raises:
        MergeError: if a file is missing, truncated or damaged, or lacks a tensor that the index says it holds.
    """
    shards = weight_map(main)
    files = weight_files(main, is_file)
    tensors: dict[str, StoredTensor] = {}
    repeated: dict[str, str] = {}
    with ThreadPoolExecutor(OPEN_THREADS) as pool:
        for file, opened in zip(files, pool.map(open_file, files), strict=True):
            for name, tensor in opened.items():
                if name in tensors:
                    repeated[name] = file.name
                if name not in tensors or shards.get(name, file.name) == file.name:
                    tensors[name] = tensor
    missing = [name for name in sorted(shards) if name not in tensors or tensors[name].path.name != shards[name]]
    if missing:
        raise MergeError(
            f"{main} lists the tensor {missing[0]}{_more(missing)}, but its file {shards[missing[0]]} does not hold "
            "it. Download the model again."
        )
    if repeated and notes is not None:
        first = next(iter(repeated))
        notes.append(
            f"{first}{_more(list(repeated))} is in several weight files. The one in {tensors[first].path.name} is "
            f"used, as {main.name} says."
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
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = read_header(path, size, lambda start, stop: os.pread(file.fileno(), stop - start, start))
        check_header(path, path)
    except OSError as error:
        raise MergeError(f"{path} cannot be read ({error.strerror}). Check the file and its disk.") from error
    return {
        name: SafetensorsTensor(name, dtype, shape, opened, offset) for name, (dtype, shape, offset) in header.items()
    }


def read_header(
    path: Path, size: int, read: Callable[[int, int], bytes]
) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
    """Read the header of a safetensors file. `check_header` must check it, too.

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
            if data + end > size:
                raise _truncated(path, size, f"tensor {name} should end at byte {data + end}")
            dtype, shape = DTYPES.get(entry["dtype"]), tuple(entry["shape"])
            if dtype is None:
                raise MergeError(
                    f"{name} in {path} has the dtype {entry['dtype']}, which cannot be read. "
                    "Save the model in float32, float16 or bfloat16."
                )
            if 0 in shape:
                torch.empty(shape, dtype=dtype, device="meta")  # raises if another size is too large for torch
            tensors[name] = dtype, shape, data + begin
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:  # a RecursionError is the last
        if isinstance(error, MergeError):
            raise
        raise _invalid(path, str(error)) from error
    return tensors


def check_header(path: Path, file: Path) -> None:
    """Raise a `MergeError` if the safetensors library refuses a file. It reads the header alone.

    Args:
        path: the file, for messages.
        file: the file to check.
    """
    try:
        with safe_open(file, "np", backend="pread"):
            pass
    except SafetensorError as error:
        raise _invalid(path, str(error).removeprefix("Error while deserializing header: ")) from error


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


def _invalid(path: Path, reason: str) -> MergeError:
    return MergeError(f"{path} is not a valid safetensors file ({reason}). Download or save it again.")
