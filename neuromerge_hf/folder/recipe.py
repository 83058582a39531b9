"""The recipe of a merge. Every merge writes one, and it reproduces the merge byte for byte."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from neuromerge_hf.config import as_config
from neuromerge_hf.errors import MergeError
from neuromerge_hf.folder.mergekit import spec_of_mergekit
from neuromerge_hf.options import nearest
from neuromerge_hf.spec import MergeSpec
from neuromerge_hf.storage.documents import load_yaml, reason_of
from neuromerge_hf.storage.hashing import Algorithm, remembered_hash
from neuromerge_hf.storage.paths import user_path
from neuromerge_hf.storage.writing import write_file
from neuromerge_hf.typed import fits

RECIPE_NAME = "recipe.yaml"

NO_RECIPE = "is not a recipe that `neuromerge merge` wrote"

PACKAGES = ("neuromerge-hf", "torch", "transformers", "peft", "safetensors")
"""The packages whose versions the recipe records, beside the one of the compiled kernel if it was used."""

HEADER = """\
# The recipe of this model. It is made again, byte for byte, by
#   neuromerge merge recipe.yaml --output DIRECTORY
"""


@dataclass(frozen=True)
class ModelRecord:
    """The record of a merge's base or expert.

    Attributes:
        id: the folder or the id on the Hub.
        revision: the commit on the Hub; None for a local folder.
        blake3: for a local folder, the hash of each file that determines the merge, by its name.
        sha256: the same in recipes of earlier versions, which have no other.
        in_memory: whether it was a model in memory, so that the recipe alone cannot make the merge again. All its
            weights have one hash.
    """

    id: str
    revision: str | None = None
    blake3: dict[str, str] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    in_memory: bool = False

    def __post_init__(self) -> None:
        hashes = fits(self.blake3, dict[str, str]) and fits(self.sha256, dict[str, str])
        flag = isinstance(self.in_memory, bool)
        if not (isinstance(self.id, str) and fits(self.revision, str | None) and hashes and flag):
            raise TypeError(f"{vars(self)} describes no model")
        for name in (*self.blake3, *self.sha256):
            inside = PurePosixPath(name)  # only modules of a SentenceTransformer are in folders
            if not name or inside.is_absolute() or {"..", ""} & {*name.split("/")} or "\\" in name or "\0" in name:
                raise MergeError(f"the file {name!r} of {self.id} is not in that folder. Do not use this recipe.")

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm of the hashes."""
        return "sha256" if self.sha256 else "blake3"

    @property
    def hashes(self) -> dict[str, str]:
        """The hash of each file by its name."""
        return self.sha256 or self.blake3

    @property
    def repo(self) -> str:
        """The repository on the Hub, without the subfolder."""
        return "/".join(self.id.split("/")[:2])

    @property
    def reference(self) -> str:
        """The model as `merge` takes it: the folder, or ``id@revision``."""
        return f"{self.id}@{self.revision}" if self.revision else self.id

    def differences(self, found: Mapping[str, str | None]) -> list[str]:
        """The files that differ from this record, as error messages.

        Args:
            found: the hashes of the files that are there, by name; None for a file that is missing.
        """
        problems = []
        for name, expected in self.hashes.items():
            path = user_path(self.id, "The model") / name
            if found.get(name) is None:
                problems.append(
                    f"{path} is missing, but the recipe needs it (relative paths start at the current folder)."
                )
            elif found[name] != expected:
                problems.append(
                    f"{path} has changed since the recipe was written: its {self.algorithm} is {found[name]}, not "
                    f"{expected}. "
                    "Bring the old file back, or merge the models themselves for a new recipe."
                )
        return problems

    def to_dict(self) -> dict[str, Any]:
        """The record as plain Python objects."""
        where: dict[str, Any] = {"revision": self.revision} if self.revision else {self.algorithm: self.hashes}
        return {"id": self.id, **({"in_memory": True} if self.in_memory else {}), **where}


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a merged model: a spec, and a record of each of its models.

    Attributes:
        spec: what was merged, and how. It gives the models by their references.
        base_model: the record of the base.
        models: the records of the experts.
        kernel: the library that computed the weights, "numba" or "torch". The last bits depend on it.
    """

    spec: MergeSpec
    base_model: ModelRecord
    models: tuple[ModelRecord, ...]
    kernel: str = "torch"

    def save(self, folder: Path) -> None:
        """Write ``recipe.yaml`` into a folder."""
        content = {
            **self.spec.to_dict(),
            "base_model": self.base_model.to_dict(),
            "models": [model.to_dict() for model in self.models],
            "versions": versions(self.kernel),
        }
        write_file(folder / RECIPE_NAME, _text(content))

    def check_files(self) -> None:
        """Raise a `MergeError` if a local file is missing, or has changed since the recipe was written."""
        problems = []
        for model in (self.base_model, *self.models):
            if model.in_memory:
                problems.append(
                    f"The recipe names {model.id}, which it cannot bring back. Load the models again and merge them."
                )
                continue
            paths = {name: user_path(model.id, "The model") / name for name in model.hashes}
            problems += model.differences(
                {
                    name: remembered_hash(path, model.algorithm) if path.is_file() else None
                    for name, path in paths.items()
                }
            )
        if problems:
            raise MergeError(problems)


def versions(kernel: str) -> dict[str, str]:
    """The versions of the packages that made a merge, by name.

    Args:
        kernel: the library that computed the weights, "numba" or "torch".
    """
    return {package: version(package) for package in (*PACKAGES, *(() if kernel in PACKAGES else (kernel,)))}


def load_merge(path: Path) -> "MergeSpec | Recipe":
    """Read a merge from a YAML file: a recipe, one that was written by hand, or a configuration of mergekit.

    One by hand has the fields of `MergeSpec`, and ``method`` beside ``config``.

    Raises:
        MergeError: if the file is missing or describes no merge.
    """
    content = load_yaml(path, NO_RECIPE)
    if not isinstance(content, Mapping) or ("versions" in content or not _is_by_hand(content)):
        return load_recipe(path)
    try:
        return spec_of_mergekit(content) if "merge_method" in content else _spec_by_hand(content)
    except MergeError as error:
        raise MergeError([f"{path}: {problem}" for problem in error.problems]) from error


def _is_by_hand(content: Mapping[str, Any]) -> bool:
    """Whether no merge wrote a file: it is mergekit's, or its models are names alone."""
    models = content.get("models")
    entries = models.values() if isinstance(models, Mapping) else models if isinstance(models, list) else ()
    return "merge_method" in content or (bool(entries) and all(isinstance(each, str) for each in entries))


def _spec_by_hand(content: Mapping[str, Any]) -> MergeSpec:
    known = ("method", *(each.name for each in fields(MergeSpec) if each.name != "names"))
    for name in content:
        if name not in known:
            near = nearest(str(name), known)
            raise MergeError(f"{name!r} is no setting of a merge." + (f" Did you mean {near!r}?" if near else ""))
    values = {name: value for name, value in content.items() if name not in ("method", "config")}
    settings = content.get("config") or {}
    if not isinstance(settings, Mapping):
        raise MergeError(f"config must be a table of hyper-parameters, not {settings!r:.100}.")
    method = {"method": content["method"]} if "method" in content else {}
    return MergeSpec(**values, config=as_config({**method, **settings}))


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        MergeError: if the file is missing or is not a recipe.
    """
    content = load_yaml(path, NO_RECIPE)
    try:
        base = ModelRecord(**content["base_model"])
        models = tuple(ModelRecord(**model) for model in content["models"])
        references = {"base_model": base.reference, "models": [model.reference for model in models]}
        spec = MergeSpec.from_dict({**content, **references})
        if "versions" not in content:  # the last entry: without it, the file may have been cut off
            raise KeyError("versions")
        return Recipe(spec, base, models, "numba" if "numba" in content["versions"] else "torch")
    except MergeError as error:
        raise MergeError([f"{path}: {problem}" for problem in error.problems]) from error
    except (KeyError, TypeError) as error:
        raise MergeError(f"{path} {NO_RECIPE}: {reason_of(error)}.") from error


def published_recipe(folder: Path, names: Sequence[str]) -> str:
    """The text of a merge's recipe with its local folders replaced by names.

    Args:
        folder: the folder of the merged model.
        names: the names of the base and then of the experts.
    """
    content = load_yaml(folder / RECIPE_NAME, NO_RECIPE)
    renamed = {}
    for model, name in zip([content["base_model"], *content["models"]], names, strict=True):
        if "revision" not in model:
            renamed[model["id"]] = model["id"] = name
    for option in ("tokenizer", "chat_template"):
        content[option] = renamed.get(content[option], content[option])
    return _text(content)


def _text(content: dict[str, Any]) -> str:
    return HEADER + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
