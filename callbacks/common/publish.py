"""The card of a merged model, with what was measured, and its way to the Hub."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from neuromerge_hf.errors import MergeError
from neuromerge_hf.folder.report import load_report
from neuromerge_hf.folder.results import Result
from neuromerge_hf.hub.push import check_repo_id, push

TASK = "evaluation set of the training"
"""What was measured, in the words of the card."""

NOT_QUALITY = ("runtime", "per_second", "preparation_time", "num_tokens", "epoch")
"""How metrics end that say nothing about the model."""

LESS_IS_BETTER = ("loss", "perplexity")
"""What the names of metrics contain of which the smallest is the best."""


def check_access(repo_id: str, token: str | bool | None) -> None:
    """Raise a `MergeError` if nothing can be pushed there, as far as that is known beforehand."""
    check_repo_id(repo_id, "hub_model_id")
    try:
        HfApi(token=token).whoami()
    except Exception as error:  # the client's own exceptions, which depend on its version
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise MergeError(
            f"The merged model cannot be pushed to {repo_id}: {reason.rstrip('.')}. Log in with "
            "`hf auth login`, or pass push_to_hub=False and push it later with `neuromerge push`."
        ) from error


def publish(
    folder: Path, metrics: Mapping[str, Mapping[str, float]], repo_id: str | None, push_options: dict[str, Any]
) -> None:
    """Put metrics, by the name of the model, into the report and the card of a merge, and push it.

    Raises:
        MergeError: if it could not be pushed.
    """
    results = [
        Result(
            model=model,
            task=TASK,
            metric=name,
            value=value,
            greater_is_better=not any(word in name for word in LESS_IS_BETTER),
        )
        for model, measured in metrics.items()
        for name, value in quality(measured).items()
    ]
    if results:
        load_report(folder).add_results(results)
    if repo_id:
        push(folder, repo_id, **push_options)


def quality(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that say something about the model, without the "eval_" that transformers puts before them."""
    return {
        name.removeprefix("eval_"): value
        for name, value in metrics.items()
        if isinstance(value, int | float) and math.isfinite(value) and not name.endswith(NOT_QUALITY)
    }
