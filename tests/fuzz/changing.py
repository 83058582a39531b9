"""Files of the models that change while they are merged. The bytes that are merged are those whose hash is recorded.

A case changes one file of a base, a fine-tune or an adapter, before the n-th call of a function that a merge calls or
after a random time. The merge must fail and leave nothing, or be the merge of the files whose hashes its recipe has.
"""

import functools
import os
import random
import shutil
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml

from campaign import Case, Outcome
from neuromerge_hf import AutoMergedModel, MergeError, api, merge, merge_recipe
from neuromerge_hf.assembly import assemble, companions
from neuromerge_hf.folder import inputs
from neuromerge_hf.planning import planner, resolve
from neuromerge_hf.storage.hashing import file_hash
from neuromerge_hf.storage.tensors import SafetensorsFile
from tiny_models import contents, save_llamas

MODELS = ("math", "code")

FILES = (
    "base/model-00001-of-00002.safetensors", "base/model-00002-of-00002.safetensors",
    "base/model.safetensors.index.json", "base/config.json", "base/generation_config.json",
    "base/tokenizer.json", "base/tokenizer_config.json", "base/LICENSE", "base/README.md",
    "math/model.safetensors", "math/config.json", "math/LICENSE",
    "code/adapter_model.safetensors", "code/adapter_config.json", "code/README.md",
)  # fmt: skip

TEXTS = {"1e-06": "1e-05", '"lora_alpha": 8': '"lora_alpha": 9', "quick": "quack", "mit": "bsd",
         '"eos_token_id": 3': '"eos_token_id": 4', '"total_size": 5': '"total_size": 6'}  # fmt: skip
"""What is replaced in texts, by as many characters. The first that a file holds is."""

CASES = 12
"""How many cases the suite tries: each takes half a second."""

DESCRIBED = ("recipe.yaml", "merge_report.json", "README.md")
"""Files of a merge with names of folders, or times."""

POINTS: dict[str, tuple[object, str, int]] = {
    "resolve": (api, "resolve", 1),
    "load_adapter_config": (resolve, "ResolvedExpert", 2),
    "InputHasher": (api, "InputHasher", 1),
    "remembered_hash": (inputs, "remembered_hash", 15),
    "load_config": (planner, "load_config", 2),
    "open_base": (planner, "open_base", 1),
    "open_full": (planner, "open_full", 1),
    "check_disk": (planner, "check_disk", 1),
    "copyfile": (companions.shutil, "copyfile", 8),
    "save_heads": (assemble, "save_heads", 1),
    "fit_method": (assemble, "fit_method", 1),
    "merge_weights": (assemble, "merge_weights", 1),
    "pread": (SafetensorsFile, "pread", 300),
    "write_card": (assemble, "write_card", 1),
}
"""Functions that a merge calls, and up to how many times."""


@functools.cache
def _originals() -> Path:
    root = save_llamas(Path(tempfile.mkdtemp(prefix="neuromerge-changes-")), shard="40KB")
    for name in ("base", "math", "code"):
        (root / name / "LICENSE").write_text("The mit licence.")
        (root / name / "README.md").write_text("---\nlicense: mit\n---\nA quick model.")
    merge([root / name for name in MODELS], root / "merged", base_model=root / "base", device="cpu", threads=1)
    return root


def _changed(content: bytes, name: str) -> bytes:
    """Other content of the same size, which is as valid as the first."""
    if name.endswith(".safetensors"):
        begin = 8 + struct.unpack("<Q", content[:8])[0]
        weights = torch.frombuffer(bytearray(content[begin:]), dtype=torch.float32) * 1.5
        return content[:begin] + weights.numpy().tobytes()
    text = content.decode()
    old = next((old for old in TEXTS if old in text), text[-3])
    return text.replace(old, TEXTS.get(old, " ")).encode()


def _put(path: Path, content: bytes) -> None:
    """Rename a file with this content over another one."""
    new = path.with_name(".new")
    new.write_bytes(content)
    os.replace(new, path)


def _edit(path: Path, content: bytes) -> None:
    """Write into a file, and set the time of its content back."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _edit_and_restore(path: Path, content: bytes) -> None:
    before = path.read_bytes()
    _edit(path, content)
    _edit(path, before)


def _replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def _link(path: Path, content: bytes) -> None:
    """Put a link in the place of a file, to another file of the same folder."""
    path.with_name("elsewhere").write_bytes(content)
    path.with_name(".link").symlink_to("elsewhere")
    os.replace(path.with_name(".link"), path)


def _append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(b" ")


WAYS: dict[str, Callable[[Path, bytes], object]] = {
    "rename over": _put,
    "edit": _edit,
    "edit and restore": _edit_and_restore,
    "replace": _replace,
    "link": _link,
    "truncate": lambda path, content: os.truncate(path, len(content) // 2),
    "delete": lambda path, content: path.unlink(),
    "append": _append,
}


def _change(models: Path, file: str, way: str) -> None:
    content = (_originals() / file).read_bytes()
    WAYS[way](models / file, _changed(content, file))


@functools.cache
def _merge_of(file: str, way: str) -> dict[str, bytes] | None:
    """The merge of models with a file that was changed before; None if it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        models = _copy(Path(folder))
        _change(models, file, way)
        try:
            return _weights(_merged("merge", models, Path(folder)))
        except MergeError:
            return None


def _copy(folder: Path) -> Path:
    return Path(shutil.copytree(_originals(), folder / "models", ignore=shutil.ignore_patterns("merged")))


def _merged(how: str, models: Path, folder: Path) -> Path:
    """Merge, and return the folder of the merge."""
    experts, base = [models / name for name in MODELS], models / "base"
    output = folder / "out" / "merged"
    if how == "cache":
        made = set((folder / "out").glob("*"))
        AutoMergedModel.from_pretrained(
            experts, base_model=base, merge_cache_dir=folder / "out", device="cpu", threads=1
        )
        return next(iter(set((folder / "out").glob("*")) - made), output)
    if how == "recipe":
        merge_recipe(folder / "recipe.yaml", output, device="cpu", threads=1)
    else:
        merge(experts, output, base_model=base, device="cpu", threads=1)
    return output


def _weights(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if name not in DESCRIBED}


@contextmanager
def _at_call(point: str, number: int, change: Callable[[], object]) -> Iterator[None]:
    """Make a change before a call of a function."""
    owner, name, _ = POINTS[point]
    original: Any = getattr(owner, name)
    calls = iter(range(1, 1 << 30))

    def function(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == number:
            change()
        return original(*arguments, **keywords)

    with patch.object(owner, name, function):
        yield


@contextmanager
def _after(seconds: float, change: Callable[[], object]) -> Iterator[None]:
    timer = threading.Timer(seconds, change)
    timer.start()
    yield
    timer.join()


def try_case(seed: int, folder: Path) -> Case:
    """Change a file while it is merged. What a case does follows from its seed, but for what a random time meets."""
    random_ = random.Random(seed)
    file, way, how = random_.choice(FILES), random_.choice(list(WAYS)), random_.choice(["merge", "cache", "recipe"])
    models = _copy(folder)
    if how == "recipe":
        text = (_originals() / "merged" / "recipe.yaml").read_text()
        (folder / "recipe.yaml").write_text(text.replace(str(_originals()), str(models)))
    with ExitStack() as stack:
        change = functools.partial(_change, models, file, way)
        if random_.random() < 0.75:
            point = random_.choice(list(POINTS))
            number = random_.randint(1, POINTS[point][2])
            stack.enter_context(_at_call(point, number, change))
            when = f"at call {number} of {point}"
        else:
            seconds = random_.uniform(0, 0.5)
            stack.enter_context(_after(seconds, change))
            when = f"after {seconds:.3f} s"
        what = f"{way} {file} {when}, {how}"
        try:
            output = _merged(how, models, folder)
        except MergeError as error:
            left = contents(folder / "out") if (folder / "out").exists() else {}
            outcome = Outcome.LEFT_OVER if left else Outcome.REFUSED
            return Case(seed, outcome, f"{what}: {sorted(left) or error}")
    return Case(seed, *_judged(models, file, way, how, output, what))


def _judged(models: Path, file: str, way: str, how: str, output: Path, what: str) -> tuple[Outcome, str]:
    """Whether a merge is that of the files whose hashes it has recorded."""
    model, _, name = file.partition("/")
    recipe = yaml.safe_load((output / "recipe.yaml").read_text())
    recorded = dict(zip(("base", *MODELS), (recipe["base_model"], *recipe["models"]), strict=True))[model]["blake3"]
    old = file_hash(_originals() / file, "blake3")
    now = file_hash(models / file, "blake3") if (models / file).exists() else None
    of_old = _weights(_originals() / "merged")
    of_now = of_old if now == old else _merge_of(file, way)
    if how == "recipe" and recorded.get(name, old) != old:
        return Outcome.WRONG, f"{what}: the recipe was made again from another file"
    found = _weights(output)
    if name in recorded:
        is_named = found == {now: of_now, old: of_old}.get(recorded[name])
    else:
        is_named = found in (of_old, of_now)
    if not is_named:
        return Outcome.WRONG, f"{what}: it is no merge of the files that its recipe names"
    if how == "cache":  # what the cache gives later is the merge of the files of then
        later = _weights(again) if (again := _merged("cache", models, output.parent.parent)).exists() else found
        if later != of_now:
            return Outcome.WRONG, f"{what}: the cache gave an older merge"
    return Outcome.CORRECT, what
