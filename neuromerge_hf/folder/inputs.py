"""The input files of a merge, and their hashes for the recipe."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from neuromerge_hf.errors import Problems
from neuromerge_hf.folder.recipe import ModelRecord
from neuromerge_hf.storage.files import (
    ADAPTER_FILES,
    CHECKPOINT_FILES,
    COMPANIONS,
    CONFIGS,
    TOKENIZER_FILES,
    companion_files,
    find_weights,
    weight_files,
)
from neuromerge_hf.storage.hashing import file_hash
from neuromerge_hf.storage.location import Location


def input_files(location: Location, *, is_base: bool = False) -> list[Path]:
    """The files of a local model that determine a merge: configurations, weights, tokenizer, the base's companions."""
    main = find_weights(location.folder, ADAPTER_FILES + CHECKPOINT_FILES)
    weights = [main, *weight_files(main)] if main else []
    configs, companions = _small_files(location, is_base)
    return list(dict.fromkeys([*configs, *weights, *companions]))


def watch_inputs(base: Location, *models: Location) -> None:
    """Watch the files of local models that planning reads besides weights. `Location` watches weights itself."""
    for location in (base, *models):
        if not location.commit:
            location.watch(chain(*_small_files(location, location is base)))


@contextmanager
def unchanged_inputs(locations: Sequence[Location]) -> Iterator[None]:
    """Make sure that the block reads the files that were opened.

    Raises:
        MergeError: before or after the block, if a file of the models has changed since. It replaces an error of the
            block that such a file may have caused.
    """

    def check() -> None:
        problems = Problems()
        for location in locations:
            problems.attempt(location.check_unchanged)
        problems.report()

    check()
    try:
        yield
    except Exception:
        check()
        raise
    check()


def identity_of(location: Location, *, is_base: bool = False) -> tuple[object, ...]:
    """A key that identifies a model without reading its weights: its commit, or sizes and times of local files."""
    if location.commit:
        return location.id, location.commit
    files = input_files(location, is_base=is_base)
    location.watch(files)
    stats = [(path.name, path.stat()) for path in files]
    return str(location.folder.resolve()), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _small_files(location: Location, is_base: bool) -> tuple[list[Path], list[Path]]:
    """The configurations and the companions of a local model that determine a merge."""
    configs = [location.folder / name for name in CONFIGS]
    companions = companion_files(location.folder, COMPANIONS if is_base else TOKENIZER_FILES)
    return [path for path in configs if path.is_file()], companions


class InputHasher:
    """Makes the records of a merge's models for the recipe. Local files are hashed on a thread until it is closed.

    Hashing a file takes a core about as long as reading it. Started early, it runs while transformers is imported.

    Args:
        base: the location of the base.
        models: the locations of the experts.
    """

    def __init__(self, base: Location, models: Sequence[Location]):
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(1, "hash")
        self._base = self._pool.submit(self._record, base, is_base=True)
        self._models = [self._pool.submit(self._record, model) for model in models]

    def __enter__(self) -> "InputHasher":
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    @property
    def base(self) -> ModelRecord:
        """The record of the base. Waits until its files are hashed."""
        return self._base.result()

    @property
    def models(self) -> tuple[ModelRecord, ...]:
        """The records of the experts. Waits until their files are hashed."""
        return tuple(model.result() for model in self._models)

    def _record(self, location: Location, *, is_base: bool = False) -> ModelRecord:
        if location.commit:
            return ModelRecord(location.id, revision=location.commit)
        files = input_files(location, is_base=is_base)
        location.watch(files)
        return ModelRecord(location.id, sha256={path.name: file_hash(path, self._stopped) for path in files})
