"""Safetensors files with a mutated header or length, against what the safetensors library says of them.

A file that the library refuses must be refused with a `MergeError` that names it, whether it is on this machine or its
header is read from the Hub by range. Any other must give the same tensors.
"""

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from campaign import Case, Outcome
from neuromerge_hf.errors import MergeError
from neuromerge_hf.storage.formats import open_safetensors
from neuromerge_hf.storage.remote import open_remote
from neuromerge_hf.storage.tensors import DTYPES, read_whole

MUTATIONS = 50
"""How many mutated files a case tries."""

BY_RANGE = 10
"""Of how many files one is also read by range."""

Header = list[tuple[str, Any]]
"""The entries of a header as pairs, because a mutation may repeat a key."""


# ------------------------------------------------------------------------------------------------------ what is right


def library_tensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors that the safetensors library reads from a file; None if it refuses the file."""
    try:
        with safe_open(path, "pt", backend="pread") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception:
        return None


def is_unusual(path: Path) -> bool:
    """Whether a file that the library accepts has a dtype, or a form of its entries, which we do not read."""
    with path.open("rb") as file:
        entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    infos = [info for name, info in entries.items() if name != "__metadata__"]
    return any(not isinstance(info, dict) or not _is_known(info["dtype"]) for info in infos)


def _is_known(dtype: object) -> bool:
    return isinstance(dtype, str) and dtype in DTYPES


def same(got: Tensor, want: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    alike = got.dtype == want.dtype and got.shape == want.shape
    return alike and torch.equal(
        *(
            torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x).view(-1).view(torch.uint8)
            for x in (got, want)
        )
    )


def defect(path: Path, by_range: bool = False) -> str | None:
    """What is wrong with how a file is read; None if nothing is."""
    want = library_tensors(path)
    try:
        got = {name: read_whole(tensor) for name, tensor in open_safetensors(path).items()}
    except MergeError as error:
        if str(path) not in str(error):
            return f"the refusal does not name the file: {error}"
        if want is not None and not is_unusual(path):
            return f"refused, though safe_open accepts it: {error}"
        got = None
    if got is not None and want is None:
        return "accepted, though safe_open refuses it"
    if got is not None and want is not None and not (got.keys() == want.keys() and all(map(_same_in(got, want), got))):
        return "other tensors than those of safe_open"
    if by_range:
        server = range_server()
        server.content = path.read_bytes()
        try:
            remote = open_remote(path, server.url, len(server.content), token=False)
        except MergeError:
            return None if got is None else "refused by range alone"
        if got is None:
            return "accepted by range alone"
        if {name: (x.dtype, x.shape) for name, x in remote.items()} != {
            name: (x.dtype, tuple(x.shape)) for name, x in got.items()
        }:
            return "another header by range"
    return None


def _same_in(got: dict[str, Tensor], want: dict[str, Tensor]) -> Callable[[str], bool]:
    return lambda name: same(got[name], want[name])


class RangeServer(ThreadingHTTPServer):
    """Serves `content` by ranges, as the Hub does."""

    content = b""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/model.safetensors"


class _Range(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def do_GET(self) -> None:
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        body = self.server.content[int(first) : int(last) + 1]
        self.send_response(206 if body else 416)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@cache
def range_server() -> RangeServer:
    """A server that runs until the process ends."""
    server = RangeServer(("127.0.0.1", 0), _Range)
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    return server


# ---------------------------------------------------------------------------------------------------------- mutations


@dataclass
class Mutant:
    """A safetensors file that is being mutated: the entries of its header, and then its bytes."""

    header: Header
    data: bytes

    @classmethod
    def valid(cls, rng: random.Random) -> "Mutant":
        header: Header = [("__metadata__", {"format": "pt"})] if rng.random() < 0.5 else []
        end = 0
        for i in range(rng.randint(1, 5)):
            dtype = rng.choice(list(DTYPES))
            shape = [rng.choice((0, 1, 2, 3, 5)) for _ in range(rng.randint(0, 3))]
            begin, end = end, end + torch.Size(shape).numel() * DTYPES[dtype].itemsize
            header.append((f"layer.{i}", {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}))
        return cls(header, rng.randbytes(end))

    def bytes(self) -> bytes:
        text = "{" + ",".join(f"{json.dumps(name)}:{_json(value)}" for name, value in self.header) + "}"
        encoded = text.encode("utf-8", "surrogatepass")
        return len(encoded).to_bytes(8, "little") + encoded + self.data


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


ODD = [
    -1, 0, 1, 7, 8, 1.0, 4.0, 1e3, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 10**400, True, None,
    "8", [], [1], {}, float("nan"), float("inf"), -0.0,
]  # fmt: skip
"""Values in place of a size or an offset."""

DTYPE_NAMES = [*DTYPES, "F4", "F8_E8M0", "F8_E4M3FNUZ", "F6_E2M3", "f32", "", "F33", 3, None, ["F32"], {"F32": None}]

METADATA = [
    "{}",
    "null",
    "[]",
    "3",
    '{"a":1}',
    '{"a":"b","a":"c"}',
    '{"a":{}}',
    '{"a":null}',
    '"pt"',
    '{"\\ud800":"x"}',
]


def _is_whole(info: dict[str, Any]) -> bool:
    return isinstance(info.get("shape"), list) and isinstance(info.get("data_offsets"), list)


def mutate_entry(mutant: Mutant, rng: random.Random) -> str:
    """Mutate a field of a tensor's entry."""
    name, info = rng.choice([entry for entry in mutant.header if entry[0] != "__metadata__"])
    if not isinstance(info, dict):
        return "nothing"
    kind = rng.choice(("dtype", "shape", "offsets", "shift", "drop", "odd field", "extra", "twice", "list"))
    if kind == "dtype":
        info["dtype"] = rng.choice(DTYPE_NAMES)
    elif kind in ("shape", "offsets") and _is_whole(info):
        numbers = info["shape" if kind == "shape" else "data_offsets"]
        where = rng.randrange(len(numbers) + 1)
        numbers[where : where + rng.randint(0, 1)] = [rng.choice(ODD)]
    elif kind == "shift" and _is_whole(info):
        by = rng.choice((-8, -4, -1, 1, 4, 8, 10**9))
        info["data_offsets"] = [x + by if isinstance(x, int) else x for x in info["data_offsets"]]
    elif kind == "drop" and info:
        info.pop(rng.choice(list(info)))
    elif kind == "odd field" and info:
        info[rng.choice(list(info))] = rng.choice(ODD)
    elif kind == "extra":
        info["extra"] = rng.choice([*ODD, {"a": [1, {"b": None}]}])
    else:
        text = json.dumps(info)
        field = rng.choice(('"dtype":"F32"', '"shape":[1]', '"data_offsets":[0,4]'))
        changed = (
            text[:-1] + ("," if info else "") + field + "}" if kind == "twice" else json.dumps(list(info.values()))
        )
        mutant.header[[entry[0] for entry in mutant.header].index(name)] = (name, changed)
    return f"{kind} of {name}"


def mutate_entries(mutant: Mutant, rng: random.Random) -> str:
    """Mutate the entries of the header as a whole: their order, names and number."""
    header = mutant.header
    kind = rng.choice(("order", "alias", "swap", "remove", "repeat", "name", "metadata", "text"))
    one, other = rng.randrange(len(header)), rng.randrange(len(header))
    if kind == "order":
        rng.shuffle(header)
    elif kind in ("alias", "swap") and isinstance(header[one][1], dict) and isinstance(header[other][1], dict):
        a, b = header[one][1].get("data_offsets"), header[other][1].get("data_offsets")
        header[one][1]["data_offsets"] = b
        if kind == "swap":
            header[other][1]["data_offsets"] = a
    elif kind == "remove" and len(header) > 1:
        del header[one]
    elif kind == "repeat":
        header.insert(other, (header[one][0], copy.deepcopy(header[one][1])))
    elif kind == "name":
        names = ("", "__metadata__", "a\ud800", "\0", "é", "a" * 70_000, header[other][0])
        header[one] = (rng.choice(names), header[one][1])
    elif kind == "metadata":
        header.insert(one, ("__metadata__", rng.choice(METADATA)))
    else:
        header[one] = (header[one][0], rng.choice(("NaN", "[" * 200 + "]" * 200, "1e999", "tru", '"\n"', "{}")))
    return kind


def mutate_bytes(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Mutate the bytes of a file: its length, the length of its header, or any of its bytes."""
    length = min(int.from_bytes(content[:8], "little"), len(content))
    kind = rng.choice(("flip", "insert", "delete", "cut", "trail", "length", "encode", "pad", "web page"))
    where = rng.randrange(len(content))
    if kind == "flip":
        return content[:where] + rng.randbytes(1) + content[where + 1 :], f"flip {where}"
    if kind == "insert":
        return content[:where] + rng.choice((b" ", b"\0", b",", b"1", b"\xff")) + content[where:], f"insert at {where}"
    if kind == "delete":
        return content[:where] + content[where + 1 :], f"delete {where}"
    if kind == "cut":
        return content[:where], f"cut at {where}"
    if kind == "trail":
        return content + rng.randbytes(rng.choice((1, 8, 4096))), "trailing bytes"
    if kind == "length":
        length = rng.choice((0, max(0, length - 1), length + 1, length + 8, 10**8, 10**8 + 1, 2**63, 2**64 - 1))
        return length.to_bytes(8, "little") + content[8:], f"header length {length}"
    if kind == "encode":
        encoding = rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig"))
        text = content[8 : 8 + length].decode(errors="replace").encode(encoding)
        return len(text).to_bytes(8, "little") + text + content[8 + length :], encoding
    if kind == "pad":
        padding = rng.choice((b" ", b"\n", b"\t \r\n", b"\0", b"\x0b", b"}")) * rng.randint(1, 9)
        return (length + len(padding)).to_bytes(8, "little") + content[8 : 8 + length] + padding + content[
            8 + length :
        ], f"padding {padding!r}"
    return b"<!DOCTYPE html>" * 20, "a web page"


def mutated(rng: random.Random) -> tuple[bytes, str]:
    """The bytes of a mutated file, and what was done to it."""
    mutant = Mutant.valid(rng)
    done = []
    for _ in range(rng.choice((0, 1, 1, 2))):
        if any(name != "__metadata__" for name, _ in mutant.header):
            done.append(rng.choice((mutate_entry, mutate_entries))(mutant, rng))
    content = mutant.bytes()
    if not done or rng.random() < 0.2:
        content, what = mutate_bytes(content, rng)
        done.append(what)
    return content, ", then ".join(done)


def try_case(seed: int, folder: Path) -> Case:
    rng = random.Random(seed)
    path = folder / "model.safetensors"
    accepted = 0
    for number in range(MUTATIONS):
        content, what = mutated(rng)
        path.write_bytes(content)
        wrong = defect(path, by_range=number % BY_RANGE == 0)
        if wrong:
            return Case(seed, Outcome.WRONG, f"mutation {number} ({what}): {wrong}")
        accepted += library_tensors(path) is not None
    return Case(seed, Outcome.CORRECT, f"{accepted} of {MUTATIONS} files are valid")
