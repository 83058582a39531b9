"""Finds the models of a merge: the experts, and the base that they share."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from neuromerge_hf.access import PUBLIC, Access
from neuromerge_hf.errors import MergeError, Problems
from neuromerge_hf.folder.inputs import unchanged_inputs
from neuromerge_hf.live import LiveModel
from neuromerge_hf.planning.configs import check_config_file
from neuromerge_hf.spec import MergeSpec
from neuromerge_hf.storage.documents import load_json
from neuromerge_hf.storage.files import ADAPTER_FILES
from neuromerge_hf.storage.location import Location, locate
from neuromerge_hf.storage.memory import LiveLocation, locate_live

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig

NO_MODELS = "models must be a list of at least one fine-tune or adapter (folders or ids on the Hub), but it is empty."

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResolvedExpert:
    """An expert whose files were found.

    Attributes:
        name: the name that the user gave, or the last part of the expert's id, with a number if an earlier expert has
            the same name.
        location: the location of the expert's files.
        adapter_config: the configuration of an adapter; None for a full checkpoint.
        config: the configuration of a full checkpoint; None until it is loaded, and for an adapter.
    """

    name: str
    location: Location
    adapter_config: "PeftConfig | None" = None
    config: "PretrainedConfig | None" = None


@dataclass(frozen=True)
class Resolved:
    """The models of a merge.

    Attributes:
        base: the location of the base.
        experts: the experts that were found, in the user's order.
        problems: the reasons why other experts were not found or cannot be merged.
    """

    base: Location
    experts: tuple[ResolvedExpert, ...]
    problems: Problems

    @property
    def locations(self) -> list[Location]:
        """The locations of the base and the experts, in this order."""
        return [self.base, *(expert.location for expert in self.experts)]

    @property
    def bytes_to_download(self) -> int:
        """The size of the weight files that are not on this machine yet."""
        return sum({file: size for model in self.locations for file, size in model.missing_weights().items()}.values())

    def fetch_weights(self) -> None:
        """Download the weight files that are not on this machine yet.

        Raises:
            MergeError: if a file cannot be downloaded.
        """
        for location in self.locations:
            location.fetch_weights()


def resolve(spec: MergeSpec, access: Access = PUBLIC, problems: Problems | None = None) -> Resolved:
    """Find the base and the experts from their small files alone, without importing transformers for full checkpoints.

    Args:
        spec: the spec that names the models.
        access: how files are downloaded from the Hub.
        problems: problems that were found before, to report them together.

    Returns:
        The models. Problems of single experts stay in the result, because the plan may find more of them.

    Raises:
        MergeError: if the base is not found. It lists all problems that were found.
    """
    problems = Problems() if problems is None else problems
    if not spec.models:
        problems.add([NO_MODELS])
        raise problems.error
    logger.info("Reading the metadata of the models")
    experts: list[ResolvedExpert] = []
    locations = [problems.attempt(partial(_locate, model, access)) for model in spec.models]
    for location, name in zip(locations, spec.names or (None,) * len(locations), strict=True):
        if location:
            with problems:
                expert = _resolve_expert(location)
                experts.append(dataclasses.replace(expert, name=name) if name else expert)
    if spec.base_model is None and not any(_named_base(expert) for expert in experts):
        problems.report()  # an expert that was not found may name the base, so its problem comes first
    with problems:
        return Resolved(_find_base(spec.base_model, experts, access), _with_unique_names(experts), problems)
    raise problems.error


def load_config(location: Location, trust_remote_code: bool = False) -> "PretrainedConfig":
    """Return the configuration of a base or a full checkpoint.

    Raises:
        MergeError: if there is none, it is damaged, it needs code that is not trusted, or the model is quantised.
    """
    if not (location.folder / "config.json").is_file():
        if (location.folder / "adapter_config.json").is_file():
            raise MergeError(f"{location} is an adapter, not a base. Give the model that it was trained on.")
        raise MergeError(f"{location} is no model: there is neither a config.json nor an adapter_config.json in it.")
    check_config_file(location.folder / "config.json")
    from neuromerge_hf.skeleton.config import read_config  # imports transformers, which takes seconds

    config = read_config(location.folder, trust_remote_code)
    config._attn_implementation = None  # it can name code on the Hub, and no merge computes attention
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        settings = quantization if isinstance(quantization, dict) else vars(quantization)
        method = settings.get("quant_method")
        raise MergeError(
            f"{location} is quantised ({method}). Give the model in float32, float16 or bfloat16 instead; if it is the "
            "base that an adapter names, pass the model that it was made from as base_model= (--base-model)."
        )
    return config


def quantised_base_notes(expert: ResolvedExpert, base: Location) -> list[str]:
    """Return a note for the report if an adapter was trained on a quantised base and is merged into another model."""
    named = _named_base(expert)
    if not named or named[0] == base.id:
        return []
    location = expert.location
    try:
        trained_on = locate(named[0], revision=named[1], access=location.access)
        quantization = load_json(trained_on.folder / "config.json").get("quantization_config")
    except MergeError:  # the named base is gone or private; the merge does not need it
        return []
    if not isinstance(quantization, dict) or not quantization:
        return []
    how = quantization.get("quant_method")
    return [
        f"{location.public_name} was trained on {trained_on.public_name}, which is quantised ({how}). It was merged "
        f"into {base.public_name}, whose weights differ from those by what quantising rounded away."
    ]


def _locate(model: str, access: Access) -> Location:
    return locate_live(model) if isinstance(model, LiveModel) else locate(model, access=access)


def _resolve_expert(location: Location) -> ResolvedExpert:
    """Return the expert at a location, under the location's name.

    Raises:
        MergeError: if it is an adapter that cannot be merged.
    """
    if not (location.folder / "adapter_config.json").is_file():
        return ResolvedExpert(location.name, location)
    from neuromerge_hf.sources.peft.config import load_adapter_config  # imports PEFT, which only adapters need

    location = dataclasses.replace(location, weight_names=ADAPTER_FILES)
    with unchanged_inputs([location]):
        return ResolvedExpert(location.name, location, load_adapter_config(location))


def input_notes(base: Location, experts: Sequence[ResolvedExpert]) -> list[str]:
    """Return notes on a base in memory, and on each expert that is another one of them, or the base."""
    notes = []
    if isinstance(base, LiveLocation):
        notes.append("The base is a model in memory, which has no tokenizer: save one beside the merged weights.")
    for number, expert in enumerate(experts):
        identity = _identity(expert.location)
        if identity == _identity(base):
            notes.append(f"{expert.name} is the base itself, which changes nothing, and counts as an expert.")
        same = [other.name for other in experts[:number] if _identity(other.location) == identity]
        if same:
            notes.append(f"{expert.name} is the same model as {same[0]}, and counts as another expert.")
    return notes


def _identity(location: Location) -> tuple[str, str | None]:
    if isinstance(location, LiveLocation):
        return f"{id(location.live and location.live.model)} in memory", None
    return (location.id, location.commit) if location.commit else (os.path.realpath(location.folder), None)


def _with_unique_names(experts: Sequence[ResolvedExpert]) -> tuple[ResolvedExpert, ...]:
    """Return the experts with a number added to a name that an earlier expert has."""
    named: dict[str, ResolvedExpert] = {}
    for expert in experts:
        name, count = expert.name, 1
        while name in named:
            count += 1
            name = f"{expert.name}-{count}"
        named[name] = dataclasses.replace(expert, name=name)
    return tuple(named.values())


def _named_base(expert: ResolvedExpert) -> tuple[str, str | None] | None:
    """Return the base that an adapter names and its revision; None if it names none, and for a full checkpoint."""
    config = expert.adapter_config
    return (config.base_model_name_or_path, config.revision) if config and config.base_model_name_or_path else None


def _find_base(base_model: str | None, experts: Sequence[ResolvedExpert], access: Access) -> Location:
    if base_model is not None:
        return _locate(base_model, access)
    named = {known: expert.location for expert in experts if (known := _named_base(expert))}
    if not named:
        raise MergeError(
            "No base model: none of the models is an adapter that names its base. Pass base_model= (--base-model), "
            "the model that they were all fine-tuned from."
        )
    if len(named) > 1:
        sides = "; ".join(f"{location} was trained on {base}" for (base, _), location in named.items())
        raise MergeError(
            f"The adapters name different bases: {sides}. Only experts of the same base can be merged; if these are "
            "names of the same model, pass base_model=."
        )
    (((base, revision), location),) = named.items()
    try:
        return locate(base, revision=revision, access=access)
    except MergeError as error:
        raise MergeError(f"{location} names its base {base!r}: {error} Or pass base_model=.") from error
