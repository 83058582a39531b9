"""What to merge (`MergeSpec`) and how to run the merge (`Runtime`): the inputs that functions and commands share.

To add an option, add a field to one of the two classes, and its type to the dictionary of keywords below them.
Signatures, `help()`, the command line, ``recipe.yaml`` and the cache key are made from the fields.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

from neuromerge_hf.access import Access
from neuromerge_hf.config import FIRST_METHOD, MergeConfig, as_config, config_class, default_config
from neuromerge_hf.errors import MergeError
from neuromerge_hf.live import LiveModel, is_model
from neuromerge_hf.options import check_names, option, pick
from neuromerge_hf.typed import check_fields
from neuromerge_hf.version import __version__

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

OWN_CHECKS = ("models", "names", "config", "dtype", "max_shard_size")
"""Fields of a `MergeSpec` whose types are checked with their values."""

EXPERT_NAME = re.compile(r"\w[\w.-]{0,99}")
"""What the name that a user gives to an expert may look like."""

RESERVED = ("base", "merged", "union")
"""What no expert can be called: a tokenizer's "base" and "union", and the "base" and "merged" of results."""

MOST_THREADS = 1024

ModelId = str | os.PathLike[str]
"""A folder, or an id on the Hub: ``owner/name`` or ``owner/name/subfolder``, optionally followed by ``@revision``."""

if TYPE_CHECKING:
    Model: TypeAlias = ModelId | PreTrainedModel | PeftModel
else:
    Model = ModelId  # neither library is imported for its class alone

Models = Sequence[Model] | Mapping[str, Model]
"""The experts of a merge, or a dictionary of them by name."""


@dataclass(frozen=True, kw_only=True)
class MergeSpec:
    """What to merge, and into what. ``recipe.yaml`` stores a spec.

    Paths are converted to strings, and dtypes to their names.

    Attributes:
        models: the experts: full checkpoints and PEFT adapters, mixed freely, in folders, on the Hub or in memory; or
            a dictionary of them by name.
        base_model: the model that the experts were fine-tuned from; None takes the base that the adapters name.
        config: the method and its hyper-parameters: a configuration, the name of a method, or a dictionary of
            hyper-parameters with the name of the method under "method".
        dtype: the dtype of the merged weights. The arithmetic is always float32.
        tokenizer: the model that gives the tokenizer: "base", an expert's name or id, or "union". If vocabularies
            differ, the rows of the embeddings are aligned by the text of their tokens. A token that the base lacks
            gets the mean row of the experts that have it. An expert that lacks a token does not change its row. Rows
            beyond the tokens come from the model that gives the tokenizer; a union puts its new tokens there first.
        chat_template: the model that gives the chat template; None keeps the template of the tokenizer.
        merge_heads: also merge heads that the base lacks, if they have the same class, shapes and labels. Each
            parameter becomes the mean over the experts, because no base exists to take differences from. Other heads
            are kept apart, unchanged.
        max_shard_size: the largest size of one weight file.
        tuned_on: the data on which the hyper-parameters were chosen. Recipe, report and card name it.
        names: the names of the experts, if `models` was a dictionary. By default each is the last part of the id.

    Raises:
        MergeError: if `models` is no list or dictionary of models, or `config` is no configuration.

    Examples:
        >>> MergeSpec(models=["math", "code"], base_model="base").dtype
        'auto'
    """

    models: tuple[str, ...]
    base_model: str | None = option(
        None, "the model that all were fine-tuned from: a folder or an id on the Hub", shown="the one the adapters name"
    )
    config: MergeConfig = option(
        None,
        "the method and its hyper-parameters, such as `NeuroMergingConfig(density=0.2)`",
        shown="NeuroIso's defaults",
        default_factory=default_config,
    )
    dtype: str = option("auto", "the dtype of the merged weights: float32, float16, bfloat16, or auto for the base's")
    tokenizer: str = option("base", "the model that gives the tokenizer: base, an expert's name or id, or union")
    chat_template: str | None = option(
        None, "the model that gives the chat template: base, or an expert's name or id", shown="the tokenizer's"
    )
    merge_heads: bool = option(False, "merge heads that the base lacks by taking their mean")
    max_shard_size: str | int = option("5GB", "the largest size of a weight file")
    tuned_on: str | None = option(None, "the data on which the hyper-parameters were chosen, for the card")
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.models, Mapping):
            object.__setattr__(self, "names", tuple(self.models))
            object.__setattr__(self, "models", tuple(self.models.values()))
        is_list = isinstance(self.models, Iterable) and not isinstance(self.models, str | os.PathLike)
        models = tuple(self.models) if is_list else ()
        models = tuple(LiveModel(each) if is_model(each) else each for each in models)
        if not is_list or not all(isinstance(each, str | os.PathLike) for each in models):
            raise MergeError(
                "models must be a list of at least one fine-tune or adapter (folders, ids on the Hub, or models of "
                f"transformers and PEFT in memory), or a dictionary of them by name, not {self.models!r:.200}."
            )
        if self.names is not None:
            object.__setattr__(self, "names", check_expert_names(self.names, len(models)))
        if self.config is None:
            object.__setattr__(self, "config", default_config())
        object.__setattr__(self, "config", as_config(self.config))
        object.__setattr__(self, "models", tuple(os.fspath(each) for each in models))
        object.__setattr__(self, "dtype", _name_of_dtype(self.dtype))
        if is_model(self.base_model):
            object.__setattr__(self, "base_model", LiveModel(self.base_model))
        if isinstance(self.base_model, os.PathLike):
            object.__setattr__(self, "base_model", os.fspath(self.base_model))
        check_fields(self, without=OWN_CHECKS)

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as plain Python objects, in the order of ``recipe.yaml``."""
        return {
            "base_model": None if self.base_model is None else str(self.base_model),
            "models": list(map(str, self.models)),
            "method": self.config.method,
            "config": self.config.to_dict(),
            **{name: getattr(self, name) for name in self._plain_names() if name != "tuned_on" or self.tuned_on},
            **({"names": list(self.names)} if self.names else {}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MergeSpec":
        """Return the spec that `to_dict` converted. An option that was added since then has its default.

        Raises:
            KeyError, TypeError: if base, models or config are missing, or a value has the wrong type.
            MergeError: if a value is out of range.
        """
        return cls(
            models=values["models"],
            base_model=values["base_model"],
            config=config_class(values.get("method", FIRST_METHOD))(**values["config"]),
            **{name: values[name] for name in (*cls._plain_names(), "names") if name in values},
        )

    @classmethod
    def _plain_names(cls) -> list[str]:
        """The fields that need no conversion for ``recipe.yaml``."""
        return [field.name for field in fields(cls) if field.name not in ("models", "base_model", "config", "names")]

    def fingerprint(self, models: Sequence[object]) -> str:
        """Return a key of the merge that depends on the settings, the models and the version of this library.

        Args:
            models: what identifies the base and the experts: commits, or the sizes and times of their files.
        """
        settings = {**self.to_dict(), "base_model": None, "models": models, "version": __version__}
        return hashlib.sha256(repr(settings).encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How to run a merge. No field changes a byte of the result.

    Examples:
        >>> Runtime(device="cpu", threads=2).overwrite
        False
    """

    device: str | int | None = option(
        None, "the device to compute on", shown="the accelerator that accelerate sees, or cpu"
    )
    threads: int | None = option(
        None, "the number of threads to compute with", shown="all processors", command_line={"min": 1}
    )
    overwrite: bool = option(False, "replace the earlier merge in the output directory, and nothing else")
    token: str | bool | None = option(
        None,
        "the token for private and gated models",
        shown="the one you logged in with",
        command_line={"envvar": "HF_TOKEN"},
        repr=False,
    )
    trust_remote_code: bool = option(False, "run model code from the repositories")
    local_files_only: bool = option(False, "use only what is in the Hub's cache already")
    force_download: bool = option(False, "download again what is in the Hub's cache already")
    cache_dir: str | os.PathLike[str] | None = option(
        None, "the folder of the Hub's cache", shown="the one that HF_HOME or HF_HUB_CACHE name"
    )

    @property
    def access(self) -> Access:
        """How files are downloaded from the Hub."""
        return Access(self.token, self.local_files_only, self.force_download, self.cache_dir)

    def __post_init__(self) -> None:
        if self.device is not None and not isinstance(self.device, int):  # torch takes an index for an accelerator
            object.__setattr__(self, "device", str(self.device))
        check_fields(self)
        if self.threads is not None and not 0 < self.threads <= MOST_THREADS:
            raise MergeError(f"threads must be a number from 1 to {MOST_THREADS}, not {self.threads}.")


class RuntimeOptions(TypedDict, total=False):
    """The keywords that make a `Runtime`."""

    device: "str | int | torch.device | None"
    threads: int | None
    overwrite: bool
    token: str | bool | None
    trust_remote_code: bool
    local_files_only: bool
    force_download: bool
    cache_dir: str | os.PathLike[str] | None


class MergeOptions(RuntimeOptions, total=False):
    """The keywords that make a `Runtime` and, with the models, a `MergeSpec`."""

    base_model: Model | None
    config: "MergeConfig | str | Mapping[str, Any] | None"
    dtype: "str | torch.dtype"
    tokenizer: str
    chat_template: str | None
    merge_heads: bool
    max_shard_size: str | int
    tuned_on: str | None


def read_options(function: str, models: Models, options: Mapping[str, Any]) -> tuple[MergeSpec, Runtime]:
    """Return the spec and the runtime that a function's keywords describe.

    Args:
        function: the function's name, for the error.
        models: the experts.
        options: the keywords of `MergeOptions`.

    Raises:
        TypeError: if a keyword is unknown. The error names the nearest known one.
        MergeError: if `MergeSpec` raises it.
    """
    check_names(function, options, OPTION_NAMES)
    return pick(MergeSpec, options, models=models), pick(Runtime, options)


def split_options(models: Models, options: Mapping[str, Any]) -> tuple[MergeSpec, Runtime, dict[str, Any]]:
    """Return the spec, the runtime and all other keywords, for functions that take further keywords."""
    known = {name: value for name, value in options.items() if name in OPTION_NAMES}
    others = {name: value for name, value in options.items() if name not in known}
    return pick(MergeSpec, known, models=models), pick(Runtime, known), others


def check_expert_names(names: object, experts: int) -> tuple[str, ...]:
    """Return the names that a user has given to experts. Folders of heads have these names.

    Raises:
        MergeError: unless there is one for each expert, all are different, and each can be the name of a folder.
    """
    found = tuple(names) if isinstance(names, list | tuple) else ()
    if len(found) != experts or len(set(found)) != experts:
        raise MergeError(f"names must be {experts} different names, one for each expert, not {names!r:.200}.")
    for name in found:
        if not isinstance(name, str) or not EXPERT_NAME.fullmatch(name) or name in RESERVED:
            raise MergeError(
                f"{name!r:.100} cannot be the name of an expert: use letters, digits, '.', '_' and '-', beginning with "
                f"a letter or digit, and none of {', '.join(RESERVED)}, which mean something else."
            )
    return found


def _name_of_dtype(dtype: Any) -> Any:
    name = str(dtype).removeprefix("torch.") if type(dtype).__name__ == "dtype" else dtype
    aliases = {"half": "float16", "float": "float32", "double": "float64"}
    return aliases.get(name, name) if isinstance(name, str) else name


RUNTIME_NAMES = tuple(each.name for each in fields(Runtime))
"""The keywords that make a `Runtime`."""

OPTION_NAMES = (*(each.name for each in fields(MergeSpec) if each.name not in ("models", "names")), *RUNTIME_NAMES)
"""The keywords that make a `Runtime` and, with the models, a `MergeSpec`."""
