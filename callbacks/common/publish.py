"""Adding metrics to the card of a merged model, and pushing the model to the Hub."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from neuromerge_hf.api import add_results
from neuromerge_hf.errors import MergeError
from neuromerge_hf.folder.report import MergeReport, load_report
from neuromerge_hf.folder.results import Result
from neuromerge_hf.hub.push import check_repo_id, push

TASK = "evaluation set of the training"
"""The name that the card gives to the data of the evaluation."""

NOT_QUALITY = ("runtime", "per_second", "preparation_time", "num_tokens", "epoch")
"""The endings of metrics' names that say nothing about the quality of the model."""

LESS_IS_BETTER = ("loss", "perplexity")
"""Parts of the names of metrics whose smallest value is the best."""


def check_access(repo_id: str, token: str | bool | None) -> None:
    """Raise a `MergeError` if the repository's id is not valid or the user is not logged in."""
    check_repo_id(repo_id, "hub_model_id")
    try:
        HfApi(token=token).whoami()
    except Exception as error:  # the classes of the client's exceptions depend on its version
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise MergeError(
            f"The merged model cannot be pushed to {repo_id}: {reason.rstrip('.')}. Log in with "
            "`hf auth login`, or pass push_to_hub=False and push it later with `neuromerge push`."
        ) from error


def publish(
    folder: Path, metrics: Mapping[str, Mapping[str, float]], repo_id: str | None, push_options: dict[str, Any]
) -> MergeReport:
    """Add metrics, by the name of the model, to the report and card of a merge, and push it if `repo_id` is given.

    Returns:
        The report on the merge.

    Raises:
        MergeError: if the push fails.
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
    report = add_results(folder, results) if results else load_report(folder)
    if repo_id:
        push(folder, repo_id, **push_options)
    return report


def quality(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that measure the quality of the model, without transformers' prefix "eval_"."""
    return {
        name.removeprefix("eval_"): value
        for name, value in metrics.items()
        if isinstance(value, int | float) and math.isfinite(value) and not name.endswith(NOT_QUALITY)
    }
