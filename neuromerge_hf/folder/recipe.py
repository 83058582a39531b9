"""The recipe that every merge writes, and that reproduces it byte for byte."""

import hashlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from neuromerge_hf.config import MergeConfig, NeuroMergingConfig, config_class
from neuromerge_hf.errors import MergeError
from neuromerge_hf.storage.files import (
    ADAPTER_FILES,
    CHECKPOINT_FILES,
    COMPANIONS,
    TOKENIZER_FILES,
    companion_files,
    find_weights,
    weight_files,
)
from neuromerge_hf.storage.location import Location

RECIPE_NAME = "recipe.yaml"

PACKAGES = ("neuromerge-hf", "torch", "transformers", "peft", "safetensors")
"""Whose versions the recipe records."""

HEADER = """\
# The recipe of this model. It is made again, byte for byte, by
#   neuromerge merge recipe.yaml --output DIRECTORY
"""


@dataclass(frozen=True)
class Ingredient:
    """A model that went into a merge.

    Attributes:
        id: the folder or the id on the Hub.
        revision: the commit on the Hub.
        sha256: for a local folder, the hash of each file that was read.
    """

    id: str
    revision: str | None = None
    sha256: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not isinstance(self.sha256, dict):
            raise TypeError(f"{self.to_dict()} describes no model")

    @property
    def repo(self) -> str:
        """The repository on the Hub, without the folder in it."""
        return "/".join(self.id.split("/")[:2])

    @property
    def reference(self) -> str:
        """What `merge` takes: the folder, or ``id@revision``."""
        return f"{self.id}@{self.revision}" if self.revision else self.id

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id, **({"revision": self.revision} if self.revision else {"sha256": self.sha256})}


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a merged model."""

    base_model: Ingredient
    models: tuple[Ingredient, ...]
    config: MergeConfig
    dtype: str = "auto"
    tokenizer: str = "base"
    chat_template: str | None = None
    merge_heads: bool = False
    max_shard_size: str | int = "5GB"
    tuned_on: str | None = None

    def save(self, folder: Path) -> None:
        """Write ``recipe.yaml``."""
        content = {
            "base_model": self.base_model.to_dict(),
            "models": [model.to_dict() for model in self.models],
            "method": self.config.method,
            "config": self.config.to_dict(),
            "dtype": self.dtype,
            "tokenizer": self.tokenizer,
            "chat_template": self.chat_template,
            "merge_heads": self.merge_heads,
            "max_shard_size": self.max_shard_size,
            **({"tuned_on": self.tuned_on} if self.tuned_on else {}),
            "versions": {package: version(package) for package in PACKAGES},
        }
        (folder / RECIPE_NAME).write_text(_text(content), encoding="utf-8")

    def check_files(self) -> None:
        """Raise a `MergeError` if a local file is not the one that the recipe was made with."""
        problems = []
        for ingredient in (self.base_model, *self.models):
            for name, expected in ingredient.sha256.items():
                path = Path(ingredient.id).expanduser() / name
                if not path.is_file():
                    problems.append(
                        f"{path} is missing, but the recipe needs it (relative paths start at the current folder)."
                    )
                elif (found := file_hash(path)) != expected:
                    problems.append(
                        f"{path} has changed since the recipe was written: its sha256 is {found}, not {expected}. "
                        "Bring the old file back, or merge the models themselves for a new recipe."
                    )
        if problems:
            raise MergeError(problems)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        MergeError: if the file is missing or is no recipe.
    """
    try:
        content = yaml.safe_load(path.read_text())
        return Recipe(
            base_model=Ingredient(**content["base_model"]),
            models=tuple(Ingredient(**model) for model in content["models"]),
            config=config_class(content.get("method", NeuroMergingConfig.method))(**content["config"]),
            dtype=content["dtype"],
            tokenizer=content["tokenizer"],
            chat_template=content["chat_template"],
            merge_heads=content["merge_heads"],
            max_shard_size=content["max_shard_size"],
            tuned_on=content.get("tuned_on"),
        )
    except OSError as error:
        raise MergeError(f"The recipe {path} cannot be read: {error}") from error
    except MergeError as error:
        raise MergeError([f"{path}: {problem}" for problem in error.problems]) from error
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise MergeError(f"{path} is not a recipe that `neuromerge merge` wrote: {reason}") from error


def read_files(location: Location, *, is_base: bool = False) -> list[Path]:
    """The files of a local model that determine a merge: configurations, weights, tokenizer, the base's companions."""
    main = find_weights(location.folder, ADAPTER_FILES + CHECKPOINT_FILES)
    configs = [location.folder / name for name in ("config.json", "adapter_config.json", "generation_config.json")]
    weights = weight_files(main) if main else []
    companions = companion_files(location.folder, COMPANIONS if is_base else TOKENIZER_FILES)
    files = dict.fromkeys([*configs, *([main] if main else []), *weights, *companions])
    return [path for path in files if path.is_file()]


def published_recipe(folder: Path, names: Sequence[str]) -> str:
    """The text of a merged folder's recipe in which folders of this machine are called by `names` alone.

    Args:
        folder: what a merge wrote.
        names: of the base and then of the experts.
    """
    content = yaml.safe_load((folder / RECIPE_NAME).read_text(encoding="utf-8"))
    renamed = {}
    for model, name in zip([content["base_model"], *content["models"]], names, strict=True):
        if "revision" not in model:
            renamed[model["id"]] = model["id"] = name
    for option in ("tokenizer", "chat_template"):
        content[option] = renamed.get(content[option], content[option])
    return _text(content)


def fingerprint(base: Location, models: Sequence[Location], *settings: object) -> str:
    """A short name for a merge by its inputs, without reading them: commits, or sizes and times of local files."""
    identity: list[object] = [version("neuromerge-hf"), *(str(setting) for setting in settings)]
    for location in (base, *models):
        if location.commit:
            identity.append((location.id, location.commit))
        else:
            stats = [(path.name, path.stat()) for path in read_files(location, is_base=location is base)]
            files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
            identity.append((str(location.folder.resolve()), files))
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:32]


def file_hash(path: Path, stopped: threading.Event | None = None) -> str:
    """The sha256 of a file; of what was read of it until `stopped` was set."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while (count := file.readinto(buffer)) and not (stopped and stopped.is_set()):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _text(content: dict[str, Any]) -> str:
    return HEADER + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


class InputHasher:
    """The models of a merge as its recipe records them. Local files are hashed in the background, until it is closed.

    A hash takes a core about as long as reading the file. Started early, it runs while transformers is loaded.
    """

    def __init__(self, base: Location, models: Sequence[Location]):
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(1, "hash")
        self._base = self._pool.submit(self._ingredient, base, is_base=True)
        self._models = [self._pool.submit(self._ingredient, model) for model in models]

    def __enter__(self) -> "InputHasher":
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    @property
    def base(self) -> Ingredient:
        """The base, when its files are hashed."""
        return self._base.result()

    @property
    def models(self) -> tuple[Ingredient, ...]:
        """The experts, when their files are hashed."""
        return tuple(model.result() for model in self._models)

    def _ingredient(self, location: Location, *, is_base: bool = False) -> Ingredient:
        if location.commit:
            return Ingredient(location.id, revision=location.commit)
        files = read_files(location, is_base=is_base)
        return Ingredient(location.id, sha256={path.name: file_hash(path, self._stopped) for path in files})
