"""The input files of a merge, and their hashes for the recipe."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from neuromerge_hf.errors import MergeError, Problems
from neuromerge_hf.folder.recipe import ModelRecord, Recipe
from neuromerge_hf.storage.files import (
    COMPANIONS,
    CONFIGS,
    TOKENIZER_FILES,
    companion_files,
    weight_files,
)
from neuromerge_hf.storage.hashing import remembered_hash
from neuromerge_hf.storage.location import Location
from neuromerge_hf.storage.memory import LiveLocation
from neuromerge_hf.storage.sentence_modules import module_files
from neuromerge_hf.storage.small_files import read_files


def input_files(location: Location, *, is_base: bool = False) -> list[Path]:
    """The files of a local model that determine a merge: configurations, weights, tokenizer, the base's companions."""
    main = location.find_weights()  # what is merged: a full model's folder can also hold an adapter
    weights = [main, *weight_files(main)] if main else []
    configs, companions = _small_files(location, is_base)
    return list(dict.fromkeys([*configs, *weights, *companions, *module_files(location.folder)]))


@contextmanager
def unchanged_inputs(locations: Sequence[Location]) -> Iterator[None]:
    """Make sure that the block reads the files that were found when the models were located.

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
    """A key that identifies a model without reading its weights: its commit, or the state of its local files.

    A file that is written again can have the size and the time of the old one, but not its time of change or its inode.
    The number of the device is no part of the key, because it may be another one after a restart.
    """
    if location.commit:
        return location.id, location.commit
    if isinstance(location, LiveLocation):
        return location.id, *location.hashes().items()
    files = list(dict.fromkeys([*input_files(location, is_base=is_base), *read_files(location.folder)]))
    location.watch(files)
    try:
        stats = [(path.name, path.stat()) for path in files]
    except OSError as error:
        raise MergeError(f"{error.filename} has gone since it was found ({error.strerror}). Run it again.") from error
    return str(location.folder.resolve()), *(
        (name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats
    )


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
        recipe: a recipe whose hashes the files must have; None if any files may be merged.
    """

    def __init__(self, base: Location, models: Sequence[Location], recipe: Recipe | None = None):
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(1, "hash")
        self._base = self._pool.submit(self._record, base, recipe.base_model if recipe else None, is_base=True)
        # A recipe has more models if one of them was not found. Planning reports that.
        expected = recipe.models[: len(models)] if recipe else [None] * len(models)
        self._models = [self._pool.submit(self._record, *pair) for pair in zip(models, expected, strict=True)]

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

    def _record(self, location: Location, expected: ModelRecord | None, *, is_base: bool = False) -> ModelRecord:
        if location.commit:
            return ModelRecord(location.id, revision=location.commit)
        if isinstance(location, LiveLocation):
            return ModelRecord(location.id, blake3=location.hashes(), in_memory=True)
        files = input_files(location, is_base=is_base)
        location.watch(files)
        names = {path.relative_to(location.folder).as_posix(): path for path in files}
        algorithm = expected.algorithm if expected else "blake3"
        hashes = {name: remembered_hash(path, algorithm, self._stopped) for name, path in names.items()}
        problems = expected.differences(hashes) if expected else []
        if problems:
            raise MergeError(problems)
        if algorithm == "sha256":
            return ModelRecord(location.id, sha256=hashes)
        return ModelRecord(location.id, blake3=hashes)
