"""The configuration of an adapter, and the check that it can be merged, without reading its weights."""

import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import peft
from packaging.version import InvalidVersion, Version
from peft import LoraConfig, PeftConfig

from neuromerge_hf.errors import MergeError
from neuromerge_hf.sources.peft.patterns import problems_of
from neuromerge_hf.sources.peft.tuner import AnyConfig, type_of
from neuromerge_hf.storage.documents import load_json, reading
from neuromerge_hf.storage.location import Location
from neuromerge_hf.typed import fits, words

Names = list[str] | str

TYPES: dict[str, Any] = {
    "base_model_name_or_path": str,
    "revision": str,
    "task_type": str,
    "peft_type": str,
    "peft_version": str,
    "r": int,
    "lora_alpha": float,
    "rank_pattern": dict[str, Any],
    "alpha_pattern": dict[str, float],
    "use_rslora": bool,
    "lora_bias": bool,
    "use_dora": bool,
    "target_modules": Names,
    "exclude_modules": Names,
    "feedforward_modules": Names,
    "modules_to_save": list[str],
    "target_parameters": list[str],
    "layers_to_transform": list[int] | int,
    "layers_pattern": Names,
    "token_indices": list[int],
    "trainable_token_indices": list[int] | dict[str, list[int]],
}
"""The types of the options that this library reads itself, besides None. PEFT does not check them."""

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
    settings = load_json(path)
    wrong = [
        f"{path}: {name} must be {words(annotation)}, not {settings[name]!r:.200}."
        for name, annotation in TYPES.items()
        if not fits(settings.get(name), annotation | None)
    ]
    wrong = wrong or [f"{path}: {problem}" for problem in problems_of(settings)]
    if wrong:
        raise MergeError(wrong)
    with reading(path, "is not an adapter configuration that this PEFT understands"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on training, and the options that _unknown_options reports
        config = PeftConfig.from_pretrained(str(location.folder))
    unknown = _unknown_options(settings, config)
    if unknown:
        raise MergeError(
            f"{path} was written by a newer PEFT and uses {', '.join(unknown)}, which PEFT {peft.__version__} does not "
            "know. Upgrade it: pip install -U peft."
        )
    reasons = list(_reasons_against(config))
    if reasons:
        raise MergeError([f"{location} {reason}" for reason in reasons])
    return config


def _unknown_options(written: dict[str, Any], config: AnyConfig) -> list[str]:
    """The options that a newer PEFT has written and the installed one ignores."""
    version = (written.get("peft_version") or "0").partition("@")[0]
    with suppress(InvalidVersion):  # of a branch: it may be newer
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
