"""Configurations of mergekit, read as what `merge` takes, for the methods that both have.

What each key means follows mergekit 0.1.5. Its methods trim each tensor on its own, and ours the whole model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from neuromerge_hf.config import MergeConfig, as_config
from neuromerge_hf.errors import MergeError
from neuromerge_hf.spec import MergeSpec
from neuromerge_hf.typed import fits

METHODS = {"linear": "average", "task_arithmetic": "task_arithmetic", "ties": "ties", "dare_ties": "dare_ties"}
"""Our names of the methods that mergekit has as well."""

NORMALIZES = {"linear": True, "task_arithmetic": False, "ties": True, "dare_ties": False}
"""mergekit's default of ``normalize`` for these methods."""

KEYS = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "tokenizer_source")
PARAMETERS = ("weight", "density", "normalize", "lambda", "int8_mask", "rescale")


@dataclass
class _Reader:
    """The parts of a configuration, and what is wrong with them."""

    content: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)

    def expect(self, is_right: bool, problem: str) -> None:
        if not is_right:
            self.problems.append(problem)

    def report(self) -> None:
        if self.problems:
            raise MergeError(f"This mergekit configuration cannot be merged: {'; '.join(self.problems)}.")

    def parameters_of(self, part: Mapping[str, Any], where: str) -> dict[str, Any]:
        found = part.get("parameters") or {}
        self.expect(isinstance(found, Mapping), f"the parameters of {where} are no table")
        if not isinstance(found, Mapping):
            return {}
        for name, value in found.items():
            self.expect(name in PARAMETERS, f"{name} of {where} is no parameter of a method that both tools have")
            is_one = isinstance(value, bool) or fits(value, float)
            self.expect(is_one, f"{name} of {where} is not one number: gradients and filters are not supported")
        return {name: value for name, value in found.items() if isinstance(value, bool) or fits(value, float)}


def spec_of_mergekit(content: Mapping[str, Any]) -> MergeSpec:
    """Return the merge that a configuration of mergekit describes.

    Raises:
        MergeError: if it describes another one than our methods make. It lists all reasons.

    Examples:
        >>> content = {"merge_method": "ties", "base_model": "base", "models": [{"model": "math"}, {"model": "code"}]}
        >>> spec_of_mergekit({**content, "parameters": {"density": 0.5}}).config.density
        0.5
    """
    reader = _Reader(content)
    method = content["merge_method"]
    is_known = isinstance(method, str) and method in METHODS
    reader.expect(is_known, f"the merge_method {method!r:.100} is not one of {', '.join(METHODS)}")
    for name in content:
        reader.expect(name in KEYS, f"{name} is not supported")
    models, own = _models(reader)
    shared = reader.parameters_of(content, "the configuration")
    reader.report()
    values = [{"weight": 1.0, "density": 1.0, **shared, **each} for each in own]
    config = _config(reader, method, values, shared.get("normalize", NORMALIZES[method]), shared.get("lambda", 1.0))
    return MergeSpec(
        models=tuple(models),
        base_model=content.get("base_model") or models[0],  # a mean of models is the same from any base
        config=config,
        dtype=content.get("out_dtype") or content.get("dtype") or "auto",
        tokenizer=content.get("tokenizer_source") or "base",
    )


def _models(reader: _Reader) -> tuple[list[str], list[dict[str, Any]]]:
    """The models that are merged, and the parameters of each."""
    content = reader.content
    base, entries = content.get("base_model"), content.get("models")
    reader.expect(base is not None or content["merge_method"] == "linear", "it has no base_model")
    if not isinstance(entries, list) or not all(isinstance(each, Mapping) and "model" in each for each in entries):
        reader.problems.append("models is no list of models")
        return [], []
    models, parameters = [], []
    for entry in entries:
        model = entry["model"]
        is_path = isinstance(model, str) and "+" not in model
        reader.expect(is_path, f"{model!r:.100} is not one model: give an adapter as a model of its own")
        if model != base or content["merge_method"] == "linear":  # elsewhere, the base among them changes nothing
            models.append(model)
            parameters.append(reader.parameters_of(entry, str(model)))
    reader.expect(bool(models), "it has no models")
    return models, parameters


def _config(reader: _Reader, method: str, values: list[dict[str, Any]], normalizes: bool, scale: float) -> MergeConfig:
    weights = [each["weight"] for each in values]
    settings: dict[str, Any] = {"weights": tuple(weights)} if len(set(weights)) > 1 else {}
    reader.expect(all(weight > 0 for weight in weights), "a weight is not above 0")
    if method == "linear":
        reader.expect(normalizes or sum(weights) == 1, "normalize is false, and the weights do not add up to 1")
    elif method == "task_arithmetic":
        divided = sum(weights) if normalizes else 1.0
        settings["scale"] = scale / divided if settings else scale * weights[0] / divided
    else:
        densities = {each["density"] for each in values}
        reader.expect(normalizes, "normalize is not true (the default of dare_ties): ours takes a mean")
        reader.expect(len(densities) == 1, "the models have different densities: ours has one for all")
        settings["scale"] = scale
        if method == "ties":
            settings["density"] = min(densities)
        else:
            settings |= {"drop_rate": 1 - min(densities), "density": 1}
            reader.expect(all(each.get("rescale", True) for each in values), "rescale is false")
    reader.report()
    return as_config({"method": METHODS[method], **settings})
