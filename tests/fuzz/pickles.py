"""`.bin` files of all kinds of tensors, torn, damaged and truncated while they are read, against `torch.load`.

Files that torch maps into memory as plain tensors must give the same tensors. All others must be refused with a
`MergeError` that names them, at once or when an entry is read that is no longer there; or give what was saved, if the
damaged bytes say nothing of the tensors.
"""

import os
import random
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from campaign import Case, Outcome
from headers import same
from neuromerge_hf.errors import MergeError
from neuromerge_hf.storage.formats import open_file
from neuromerge_hf.storage.tensors import StoredTensor, read_whole

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def plain_tensors(rng: random.Random) -> dict[str, Tensor]:
    """Tensors that can be merged: parameters, views of a shared storage, strided and expanded ones, scalars."""
    dtype = rng.choice(DTYPES)
    rows, columns = rng.randint(1, 70), rng.randint(1, 70)
    matrix = torch.randint(0, 2, (rows, columns), generator=torch.Generator().manual_seed(rng.randrange(99))).to(dtype)
    views = {
        "matrix": matrix,
        "transposed": matrix.T,
        "row": matrix[rows // 2],
        "column": matrix[:, columns // 2],
        "part": matrix[rows // 3 :, columns // 3 :],
        "steps": matrix[::2, ::3],
        "expanded": matrix[:1].expand(5, columns),
        "permuted": matrix.expand(3, rows, columns).permute(2, 0, 1),
        "scalar": matrix[0, 0],
        "empty": matrix[:0].T,
        "copy": matrix.clone(),
        "bytes": torch.randint(0, 255, (3,), dtype=torch.uint8),
        "uint16": torch.zeros(4, dtype=torch.uint16),
        "float8": torch.zeros(4).to(torch.float8_e4m3fn),
        "complex": torch.zeros(4, dtype=torch.complex64),
    }
    chosen = rng.sample(sorted(views), rng.randint(1, 8))
    tensors = {name: views[name] for name in chosen}
    for name in chosen:
        if tensors[name].is_floating_point() and rng.random() < 0.3:
            tensors[name] = nn.Parameter(tensors[name])
            if rng.random() < 0.3:
                tensors[name].ds_id = 3  # as DeepSpeed marks its parameters
    return tensors


def other_values(rng: random.Random) -> Any:
    """A value that cannot be merged."""
    values = {
        "meta": torch.zeros(3, device="meta"),
        "sparse": torch.eye(3).to_sparse(),
        "rows": torch.eye(3).to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        "number": 3,
        "text": "weights",
        "none": None,
        "dict": {"a": torch.zeros(3)},
        "list": [torch.zeros(3)],
        "module": nn.Linear(2, 2),
    }
    return values[rng.choice(sorted(values))]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The bytes of a torn or otherwise damaged file. The last kilobyte is the list of an archive's records."""
    where = rng.randrange(len(content)) if rng.random() < 0.5 else max(0, len(content) - rng.randint(1, 1024))
    kind = rng.choice(("cut", "flip", "insert", "delete", "zeros", "head", "garbage"))
    if kind == "cut":
        return content[:where]
    if kind == "flip":
        return content[:where] + rng.randbytes(1) + content[where + 1 :]
    if kind == "insert":
        return content[:where] + rng.randbytes(rng.randint(1, 64)) + content[where:]
    if kind == "delete":
        return content[:where] + content[where + rng.randint(1, 64) :]
    if kind == "zeros":
        return content[:where] + bytes(len(content) - where)
    if kind == "head":
        return content[rng.randint(1, 64) :]
    return rng.randbytes(rng.randint(0, 99))


def truth(tensor: Tensor) -> Tensor:
    """A tensor as it is; of a bool, whether each byte is 0, since a damaged one may be neither 0 nor 1."""
    return tensor.contiguous().view(torch.uint8) != 0 if tensor.dtype == torch.bool else tensor


def torch_tensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors that torch maps from a file; None if it refuses the file, or not all are plain."""
    state = None
    for mmap in (True, False):  # files of torch < 1.6 cannot be mapped
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            break
        except Exception:
            continue
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        return None
    if any(x.layout != torch.strided or x.is_quantized or x.is_meta or x.is_nested for x in state.values()):
        return None
    return {name: tensor.detach() for name, tensor in state.items()}


def read_parts(tensor: StoredTensor, rng: random.Random) -> Tensor:
    """Read a tensor in two ranges."""
    out = torch.empty(tensor.shape, dtype=tensor.dtype).view(-1)
    cut = rng.randint(0, len(out))
    tensor.read(0, cut, out[:cut])
    tensor.read(cut, len(out), out[cut:])
    return out.view(tensor.shape)


def try_case(seed: int, folder: Path) -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says of prototypes: sparse, quantised and nested tensors
        return _try_case(seed, folder)


def _try_case(seed: int, folder: Path) -> Case:
    rng = random.Random(seed)
    path = folder / "pytorch_model.bin"
    state: dict[str, Any] = OrderedDict(plain_tensors(rng))
    new = rng.random() < 0.8
    if not new:
        state = {name: value for name, value in state.items() if name not in ("uint16", "float8")}
    kind = rng.choice(("valid", "other value", "damaged", "truncated"))
    if kind == "other value":
        state["other"] = other_values(rng)
    try:
        torch.save(state if rng.random() < 0.97 else list(state.values()), path, _use_new_zipfile_serialization=new)
    except Exception:  # the old format cannot hold every tensor
        return Case(seed, Outcome.CORRECT, "torch cannot save it")
    if kind == "damaged":
        path.write_bytes(damaged(path.read_bytes(), rng))
    what = f"{kind}, {'archive' if new else 'old file'} of {', '.join(state)}"

    want = torch_tensors(path)
    try:
        tensors = open_file(path)
        if kind == "truncated":
            os.truncate(path, rng.randrange(path.stat().st_size))
            for tensor in tensors.values():
                read_whole(tensor)
        got = {name: read_parts(tensor, rng) for name, tensor in tensors.items()}
    except MergeError as error:
        if str(path) not in str(error):
            return Case(seed, Outcome.WRONG, f"{what}: the refusal does not name the file: {error}")
        if want is not None and kind not in ("truncated", "damaged"):
            return Case(seed, Outcome.WRONG, f"{what}: refused, though torch loads it: {error}")
        return Case(seed, Outcome.REFUSED, f"{what}: {error}")
    if kind == "damaged" and not new:
        return Case(seed, Outcome.CORRECT, what)  # torch itself may leave storages of such a file unfilled
    if want is None and kind == "damaged" and isinstance(state, dict):
        want = state
    if want is None:
        return Case(seed, Outcome.WRONG, f"{what}: accepted, though torch refuses it")
    if got.keys() != want.keys() or not all(same(truth(got[name]), truth(want[name].detach())) for name in got):
        return Case(seed, Outcome.WRONG, f"{what}: other tensors than those of torch")
    return Case(seed, Outcome.CORRECT, what)
