"""Averaging the last models of a training, before or instead of a merge with other experts."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from neuromerge_hf.config import check_weights, default_config
from neuromerge_hf.errors import MergeError
from neuromerge_hf.methods.average import AverageConfig
from neuromerge_hf.spec import MergeSpec
from neuromerge_hf.storage.files import tokenizer_files

Window = int | tuple[float, ...]
"""How many of the last models are averaged, or the weight of each, oldest first. The trained model is the last."""


def check_window(value: object) -> Window:
    """Return a window; a list of weights becomes a tuple.

    Raises:
        MergeError: unless the value is a number of models, or weights of several.
    """
    window = value if isinstance(value, int) else check_weights("average_checkpoints", value)
    if isinstance(value, bool) or length_of(window) < 2:
        raise MergeError(
            "average_checkpoints must be how many of the last models to average, from 2, or their weights, oldest "
            f"first, not {value!r}."
        )
    return window


def length_of(window: Window) -> int:
    """The number of models in a window."""
    return window if isinstance(window, int) else len(window)


def check_averages_alone(spec: MergeSpec) -> None:
    """Raise a `MergeError` if a spec without other experts names a method, because there is nothing to merge."""
    if spec.config not in (default_config(), AverageConfig()):
        raise MergeError(
            f"There is nothing to merge by {spec.config.title}: without other experts, average_checkpoints gives the "
            "average itself. Leave config out, or name other experts."
        )


def average_alone(spec: MergeSpec, models: Sequence[Path], window: Window) -> MergeSpec:
    """The spec of the average of `models`, oldest first, as the result. There may be fewer models than in the window.

    Heads that the base lacks are averaged, too, and the tokenizer is that of the training if it saves one.
    """
    weights = None if isinstance(window, int) else window[-len(models) :]
    has_tokenizer = spec.tokenizer == "base" and tokenizer_files(models[-1])
    return replace(
        spec,
        models=tuple(map(str, models)),
        config=AverageConfig(weights=weights),
        tokenizer=str(models[-1]) if has_tokenizer else spec.tokenizer,
        merge_heads=True,
    )


def average_as_expert(spec: MergeSpec, models: Sequence[Path], window: Window) -> MergeSpec:
    """The spec of the average of `models`, oldest first, as an expert of `spec`. It is float32, so it is not rounded.

    It is a full model, also of adapters: the mean of their factors would be another model.
    """
    return average_alone(
        replace(spec, dtype="float32", tokenizer="base", chat_template=None, tuned_on=None), models, window
    )
