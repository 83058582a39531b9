"""The configuration of an adapter, and the check that it can be merged, without reading its weights."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import peft
from packaging.version import Version
from peft import LoraConfig, PeftConfig

from neuromerge_hf.errors import MergeError
from neuromerge_hf.sources.peft.tuner import AnyConfig, type_of
from neuromerge_hf.storage.location import Location

NO_WEIGHT_CHANGES = {
    "ADAPTION_PROMPT": "adds to what the attention layers read",
    "LILY": "mixes its matrices anew for each input",
    "POLY": "mixes its parts by the task that each input names",
    "SHADOW": "runs a second model beside the base",
    "XLORA": "mixes several adapters anew for each token",
}
"""What adapters of some types do instead of modifying the base's weights. Prompt tuning is checked separately."""

NO_WEIGHT_CHANGE_OPTIONS = {
    "alora_invocation_tokens": "acts only on what follows its invocation tokens",
    "arrow_config": "chooses among several adapters anew for each token",
    "layer_replication": "is made for a model with more layers than its base",
    "use_qalora": "acts on averages of its inputs, which PEFT adds to quantised layers and cannot merge",
}
"""What LoRA does with some options instead of modifying the base's weights."""

TRAINED_INITIALISATIONS = ("corda", "lora_ga")
"""Values of LoraConfig.init_lora_weights with which PEFT changes the base's weights depending on training data."""


def load_adapter_config(location: Location) -> AnyConfig:
    """Load an adapter's configuration.

    Raises:
        MergeError: if it is damaged, or describes an adapter that cannot be merged.
    """
    path = location.folder / "adapter_config.json"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on training, and the options that _unknown_options reports
            config = PeftConfig.from_pretrained(str(location.folder))
    except ImportError as error:
        raise MergeError(f"{path} needs a package that is not installed here: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise MergeError(f"{path} is not an adapter configuration that this PEFT understands: {error}") from error
    unknown = _unknown_options(path, config)
    if unknown:
        raise MergeError(
            f"{path} was written by a newer PEFT and uses {', '.join(unknown)}, which PEFT {peft.__version__} does not "
            "know. Upgrade it: pip install -U peft."
        )
    reasons = list(_reasons_against(config))
    if reasons:
        raise MergeError([f"{location} {reason}" for reason in reasons])
    return config


def _unknown_options(path: Path, config: AnyConfig) -> list[str]:
    """The options that a newer PEFT has written and the installed one ignores."""
    written = json.loads(path.read_text())
    version = str(written.get("peft_version") or "0").partition("@")[0]
    if Version(version) <= Version(peft.__version__):
        return []
    return sorted(option for option, value in written.items() if value and not hasattr(config, option))


def _reasons_against(config: AnyConfig) -> Iterator[str]:
    """The reasons why an adapter cannot be merged, as sentences without their subject."""
    remedy = "which is no change of the base's weights, so that it cannot be merged. Leave it out."
    kind = type_of(config)
    if config.is_prompt_learning:
        yield f"is an adapter of type {kind}: it adds to what the model reads, {remedy}"
    elif kind in NO_WEIGHT_CHANGES:
        yield f"is an adapter of type {kind}: it {NO_WEIGHT_CHANGES[kind]}, {remedy}"
    if not isinstance(config, LoraConfig):
        return
    for option, reason in NO_WEIGHT_CHANGE_OPTIONS.items():
        if getattr(config, option, None):
            yield f"uses {option}: it {reason}, {remedy}"
    if str(config.init_lora_weights).startswith(TRAINED_INITIALISATIONS):
        yield (
            f"has changed its base's weights by its training data (init_lora_weights={config.init_lora_weights!r}), "
            "and the change is not in its file. Save it with PEFT's path_initial_model_for_weight_conversion."
        )
