"""The YAML metadata at the top of a card, which the Hub reads. They never name a model that is not on the Hub."""

import posixpath
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCardData

from neuromerge_hf.folder.parents import common_license, union
from neuromerge_hf.folder.results import MERGED, Result
from neuromerge_hf.model_cards.card import MergeCard
from neuromerge_hf.model_cards.markdown import plain
from neuromerge_hf.model_cards.tasks import task_of

TAGS = ("merge",)
"""The tags by which people find merges, besides the name of the method."""

LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
"""Values that the Hub accepts. The card of a local model can name others, such as folders on somebody's machine."""

SENTENCE_TAGS = ("sentence-transformers", "sentence-similarity", "feature-extraction")
"""The tags that sentence-transformers gives to its models."""

RESULT_KEYS = ("model-index", "model_name")
"""The keys of results. Old results were measured with other weights, so they are dropped."""


def metadata(card: MergeCard) -> ModelCardData:
    """The metadata of a merged model's card."""
    on_hub = list(dict.fromkeys(model.repo for model in card.models if model.revision))
    parents = card.report.parents
    results = _results(card)
    licence: dict[str, Any] = _licence(card)
    return ModelCardData(
        model_name=plain(card.name) if results else None,
        base_model=on_hub or None,
        base_model_relation="merge" if on_hub else None,
        library_name="sentence-transformers" if card.is_sentence_transformer else "transformers",
        pipeline_tag=_pipeline_tag(card),
        tags=[*TAGS, card.report.method, *SENTENCE_TAGS * card.is_sentence_transformer],
        language=[name for name in union(parent.languages for parent in parents) if LANGUAGE.fullmatch(name)] or None,
        # The base's data sets are on its own card: here they would bury those of the experts.
        datasets=[name for name in union(parent.datasets for parent in parents[1:]) if DATASET.fullmatch(name)] or None,
        eval_results=results or None,
        **licence,
    )


def _pipeline_tag(card: MergeCard) -> str | None:
    if card.is_sentence_transformer:
        return "sentence-similarity"
    return card.task.pipeline_tag if card.task else None


def _licence(card: MergeCard) -> dict[str, str]:
    """The entries of the licence that the parents share. A relative link becomes a link to the base's file."""
    entries, base = common_license(card.report.parents), card.recipe.base_model
    link = entries.get("license_link")
    if link is None or link.startswith(("https://", "http://")):
        return entries
    if base.revision:
        folder = base.id.removeprefix(base.repo).strip("/")
        path = quote(posixpath.join(folder, link))
        return entries | {"license_link": f"https://huggingface.co/{quote(base.repo)}/blob/{base.revision}/{path}"}
    del entries["license_link"]
    return {} if entries["license"] == "other" else entries  # the licence "other" needs a link


def _results(card: MergeCard) -> list[EvalResult]:
    results = [result for result in card.report.results if result.model == MERGED and not card.report.changed]
    unlisted = list(dict.fromkeys(result.task for result in results if not _dataset(result)))
    return [
        EvalResult(
            task_type=result.task_type or _task_type(card, result),
            # The Hub asks for an id, and tools tell results apart by it: a made-up one must not be that of a data set.
            dataset_type=_dataset(result) or f"unlisted-{unlisted.index(result.task) + 1}",
            dataset_name=plain(result.task),
            dataset_split=result.split,
            metric_type=plain(result.metric),
            metric_value=result.value,
        )
        for result in results
    ]


def _dataset(result: Result) -> str | None:
    """The id of the data set on the Hub, if the result names one."""
    return result.dataset if result.dataset and DATASET.fullmatch(result.dataset) else None


def _task_type(card: MergeCard, result: Result) -> str:
    """The task of the expert that was measured beside the merge, or else the merged model's own task."""
    measured = {other.model for other in card.report.results if other.measured == result.measured}
    experts = [task_of(expert.model_class) for expert in card.report.experts if expert.name in measured]
    found = (task.pipeline_tag for task in (*experts, card.task) if task and task.pipeline_tag)
    return next(found, "other")


def combined(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The new metadata, with tags and other entries that people added to the old."""
    tags = [*new["tags"], *(tag for tag in old.get("tags") or [] if isinstance(tag, str))]
    others = {key: value for key, value in old.items() if key not in (*new, *RESULT_KEYS)}
    return {**new, **others, "tags": list(dict.fromkeys(tags))}
