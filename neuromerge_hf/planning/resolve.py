"""Which models a merge is of: the experts, the base that they share, and the configurations of all."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from neuromerge_hf.errors import MergeError, Problems
from neuromerge_hf.storage.files import ADAPTER_FILES
from neuromerge_hf.storage.location import Location, locate

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig

ModelId = str | os.PathLike[str]


@dataclass(frozen=True)
class FoundModels:
    """Which models a merge is of.

    Attributes:
        base: where the base is.
        experts: where the experts are that were found and, if they are adapters, are of a kind that can be merged.
        adapters: their configurations, if they are adapters; None for full checkpoints.
        problems: why the other experts were not found or cannot be merged.
    """

    base: Location
    experts: "list[Location]"
    adapters: "list[PeftConfig | None]"
    problems: Problems

    @property
    def locations(self) -> list[Location]:
        """The base and the experts."""
        return [self.base, *self.experts]

    @property
    def bytes_to_download(self) -> int:
        """The size of the weight files that are not downloaded yet."""
        return sum({file: size for model in self.locations for file, size in model.missing_weights().items()}.values())

    def fetch_weights(self) -> None:
        """Download the weight files that are not here yet.

        Raises:
            MergeError: if they cannot be had.
        """
        for location in self.locations:
            location.fetch_weights()


def find_models(
    models: Sequence[ModelId],
    base_model: ModelId | None,
    token: str | bool | None,
    problems: Problems | None = None,
) -> FoundModels:
    """Find the base and the experts.

    Args:
        problems: what has been found wrong before, to be reported together.

    Raises:
        MergeError: if the base is not found, with everything else that was found wrong. Problems with experts alone
            are left in the result, because more may be found wrong with the others.
    """
    problems = Problems() if problems is None else problems
    if isinstance(models, str | os.PathLike) or not models:
        problems.add(
            [f"models must be a list of at least one fine-tune or adapter (folders or ids on the Hub), not {models!r}."]
        )
        raise problems.error
    located = [problems.attempt(partial(locate, model, token=token)) for model in models]
    experts: list[Location] = []
    adapters: list[PeftConfig | None] = []
    for location in filter(None, located):
        with problems:
            adapter = _adapter_config(location)
            adapters.append(adapter)
            experts.append(replace(location, weight_names=ADAPTER_FILES) if adapter else location)
    if base_model is None and not any(adapter and adapter.base_model_name_or_path for adapter in adapters):
        problems.report()  # one of those may have named it
    with problems:
        return FoundModels(_find_base(base_model, experts, adapters, token), experts, adapters, problems)
    raise problems.error


def load_config(location: Location, trust_remote_code: bool = False) -> "PretrainedConfig":
    """A model's configuration.

    Raises:
        MergeError: if there is none, it is damaged, needs code that is not trusted, or is that of a quantised model.
    """
    if not (location.folder / "config.json").is_file():
        if (location.folder / "adapter_config.json").is_file():
            raise MergeError(f"{location} is an adapter, not a base. Give the model that it was trained on.")
        raise MergeError(f"{location} is no model: there is neither a config.json nor an adapter_config.json in it.")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(location.folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if "trust_remote_code=True" in str(error):
            raise MergeError(
                f"{location} has a class of its own, whose code lies beside its weights. Read that code; if you trust "
                "it, let it run with trust_remote_code=True (--trust-remote-code)."
            ) from error
        raise MergeError(f"{location.folder / 'config.json'} cannot be read: {error}") from error
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise MergeError(
            f"{location} is quantised ({method}). Give the model in float32, float16 or bfloat16 instead; if it is the "
            "base that an adapter names, pass the model that it was made from as base_model= (--base-model)."
        )
    return config


def about_quantised_base(location: Location, adapter: "PeftConfig", base: Location) -> list[str]:
    """What the report says of an adapter that was trained on a quantised base, and is merged into another."""
    named = adapter.base_model_name_or_path
    if not named or named == base.id:
        return []
    try:
        trained_on = locate(named, revision=adapter.revision, token=location.token)
        quantization = json.loads((trained_on.folder / "config.json").read_text()).get("quantization_config")
    except (MergeError, OSError, ValueError):  # it is gone or private, and not needed
        return []
    if not quantization:
        return []
    how = quantization.get("quant_method")
    return [
        f"{location.public_name} was trained on {trained_on.public_name}, which is quantised ({how}). It was merged "
        f"into {base.public_name}, whose weights differ from those by what quantising rounded away."
    ]


def unique_names(locations: Sequence[Location]) -> list[str]:
    """A name for each expert: the last part of its id, with a number where two are the same."""
    names: list[str] = []
    for location in locations:
        name, count = location.name, 1
        while name in names:
            count += 1
            name = f"{location.name}-{count}"
        names.append(name)
    return names


def _adapter_config(location: Location) -> "PeftConfig | None":
    if not (location.folder / "adapter_config.json").is_file():
        return None
    from neuromerge_hf.sources.peft.config import load_adapter_config  # imports PEFT, which only adapters need

    return load_adapter_config(location)


def _find_base(
    base_model: ModelId | None,
    locations: Sequence[Location],
    adapters: "Sequence[PeftConfig | None]",
    token: str | bool | None,
) -> Location:
    named = {
        (adapter.base_model_name_or_path, adapter.revision): location
        for location, adapter in zip(locations, adapters, strict=True)
        if adapter and adapter.base_model_name_or_path
    }
    if base_model is not None:
        return locate(base_model, token=token)
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
    ((base, revision),) = named
    try:
        return locate(base, revision=revision, token=token)
    except MergeError as error:
        raise MergeError(
            f"{next(iter(named.values()))} names its base {base!r}: {error} Or pass base_model=."
        ) from error
