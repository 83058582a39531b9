"""Opening ``.bin`` files. Nothing in them is executed, and the entries of their tensors are read in ranges.

`torch.load` reads a whole file, or maps it into memory, and then the process ends by a signal if the file becomes
shorter. The files of torch >= 1.6 are zip archives that hold each storage uncompressed, so that its entries can be read
from the file like those of a safetensors file.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuromerge_hf.errors import MergeError
from neuromerge_hf.storage.tensors import MemoryTensor, SafetensorsFile, SafetensorsTensor, StoredTensor, StridedTensor

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
"""The dtype of each class of storages that `torch.save` writes."""

LOCAL_HEADER = struct.Struct("<4s22xHH")
"""The signature of a record in a zip archive, and the lengths of the name and of the extra field that follow."""


def open_pickle(path: Path) -> Mapping[str, StoredTensor]:
    """Open the tensors of a ``.bin`` file by name.

    Raises:
        MergeError: if the file is damaged, or holds anything but tensors.
    """
    try:
        with path.open("rb") as file:
            is_archive = file.read(4) == b"PK\x03\x04"
        state = _read_archive(path) if is_archive else _read_old_file(path)
    except MergeError:
        raise
    except pickle.UnpicklingError as error:
        raise MergeError(
            f"{path} is damaged or holds more than plain tensors ({_first_sentence(error)}). Nothing in it was "
            "executed, as with torch.load(weights_only=True). Download it again, or save the model as safetensors."
        ) from error
    except Exception as error:  # neither torch nor zipfile documents all exception types
        raise MergeError(
            f"{path} cannot be read ({type(error).__name__}: {_first_sentence(error)}). "
            "It may be truncated: download or save it again."
        ) from error
    return state


def _first_sentence(error: Exception) -> str:
    return str(error).partition(". ")[0].partition("\n")[0]


def _no_state_dict(path: Path) -> MergeError:
    return MergeError(f"{path} is not a state dict of tensors. Save the model again, with save_pretrained.")


def _read_old_file(path: Path) -> dict[str, MemoryTensor]:
    """Read a file of torch < 1.6 into memory."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise _no_state_dict(path)
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
            raise MergeError(
                f"{name} in {path} is no plain tensor, but sparse, quantised, nested or without data, which cannot be "
                "merged. Save the model again as safetensors, with save_pretrained."
            )
    return {name: MemoryTensor(name, tensor.detach(), path) for name, tensor in state.items()}


# -------------------------------------------------------------------------------------------------------- archives


@dataclass(frozen=True)
class _Pickled:
    """A tensor as the pickle describes it: a view of a storage, which is a record of the archive."""

    key: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Unpickler(pickle._Unpickler):  # in Python: a few bytes can make the one in C allocate all memory
    """Unpickles a state dict. It knows the functions and classes of plain tensors alone, and puts its own for them."""

    def persistent_load(self, saved: Any) -> tuple[str, torch.dtype]:
        """Return the key and the dtype of a storage."""
        kind, dtype, key, *_ = saved
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError(f"it refers to {kind!r}")
        return key, dtype

    def find_class(self, module: str, name: str) -> object:
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        known = {
            "collections.OrderedDict": OrderedDict,
            "torch.Size": tuple,
            "torch.Tensor": None,
            "torch.nn.parameter.Parameter": None,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor_of_dtype,
            "torch._utils._rebuild_parameter": self._parameter,
            "torch._utils._rebuild_parameter_with_state": self._parameter,
            "torch._tensor._rebuild_from_type_v2": self._with_attributes,
        }
        if f"{module}.{name}" not in known:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return known[f"{module}.{name}"]

    def _tensor(
        self,
        storage: tuple[str, torch.dtype],
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        requires_grad: bool = False,
        hooks: object = None,
        metadata: Mapping[str, bool] | None = None,
    ) -> _Pickled:
        if metadata and any(metadata.values()):
            raise pickle.UnpicklingError("a conjugated or negated view of a tensor")
        return _Pickled(storage[0], offset, tuple(shape), tuple(stride), storage[1])

    def _tensor_of_dtype(
        self,
        storage: tuple[str, torch.dtype],
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        requires_grad: bool,
        hooks: object,
        dtype: torch.dtype,
        metadata: Mapping[str, bool] | None = None,
    ) -> _Pickled:
        return self._tensor((storage[0], dtype), offset, shape, stride, metadata=metadata)

    def _parameter(self, data: object, *_: object) -> object:
        return data

    def _with_attributes(
        self, rebuild: Callable[..., object], kind: object, arguments: tuple[object, ...], attributes: object
    ) -> object:
        return rebuild(*arguments)


def _read_archive(path: Path) -> dict[str, StoredTensor]:
    """Read where the tensors of an archive are."""
    opened = SafetensorsFile(path)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        begins = [record.header_offset for record in archive.infolist()]
        # zipfile moves all records if bytes are missing or added before their list.
        if len(pickles) != 1 or len(set(names)) != len(names) or min(begins) != 0:
            raise zipfile.BadZipFile("it is no archive of torch.save")
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise zipfile.BadZipFile("it is compressed")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
            raise MergeError(f"{path} was saved on a big-endian machine. Save the model again, as safetensors.")
        state = _Unpickler(io.BytesIO(archive.read(pickles[0])), encoding="utf-8").load()
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise _no_state_dict(path)
        tensors: dict[str, StoredTensor] = {}
        for name, pickled in state.items():
            if not isinstance(pickled, _Pickled):
                raise _no_state_dict(path)
            record = archive.getinfo(f"{folder}data/{pickled.key}")
            start = _first_byte(opened, record)
            tensors[name] = _tensor(name, pickled, opened, start, record.file_size)
    return tensors


def _first_byte(file: SafetensorsFile, record: zipfile.ZipInfo) -> int:
    """The position in the file of the first byte of a record's data."""
    header = torch.empty(LOCAL_HEADER.size, dtype=torch.uint8)
    file.pread(record.header_offset, header)
    signature, name, extra = LOCAL_HEADER.unpack(bytes(header.tolist()))
    if signature != b"PK\x03\x04" or record.flag_bits & 1:
        raise zipfile.BadZipFile(f"{record.filename} is damaged or encrypted")
    start = record.header_offset + LOCAL_HEADER.size + name + extra
    if start + record.file_size > file.path.stat().st_size:
        raise zipfile.BadZipFile(f"{record.filename} ends after the end of the file")
    return int(start)


def _tensor(name: str, pickled: _Pickled, file: SafetensorsFile, start: int, nbytes: int) -> StoredTensor:
    """The tensor in a storage that has so many bytes and begins at byte `start` of the file.

    Raises:
        ValueError: if the tensor is not inside its storage.
    """
    offset, shape, stride, dtype = pickled.offset, pickled.shape, pickled.stride, pickled.dtype
    if min((offset, *shape, *stride), default=0) < 0:
        raise ValueError(f"{name} has a negative size, stride or offset")
    last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
    if 0 not in shape and (last + 1) * dtype.itemsize > nbytes:
        raise ValueError(f"{name} ends after the end of its storage")
    first_byte = start + offset * dtype.itemsize
    if torch.empty_strided(shape, stride, dtype=dtype, device="meta").is_contiguous():
        return SafetensorsTensor(name, dtype, shape, file, first_byte)
    return StridedTensor(name, dtype, shape, stride, file, first_byte)
