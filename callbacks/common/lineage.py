"""The base that the model in training shares with the other experts, if training started from a fine-tune of it."""

import logging

import torch

from neuromerge_hf.assembly.assemble import foreign_warnings
from neuromerge_hf.engine.base_check import check_bases
from neuromerge_hf.engine.passes import Passes
from neuromerge_hf.errors import MergeError
from neuromerge_hf.planning.named_base import named_bases, other_bases, same_name
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.planning.resolve import Resolved

logger = logging.getLogger(__name__)


def warn_of_foreign(plan: MergePlan) -> None:
    """Warn of experts whose weights tell that they are no fine-tunes of the base, if all weights are on this machine.

    The first expert is the model in training, whose weights are not there yet.
    """
    if plan.costs.bytes_to_download or any(expert.computed for expert in plan.experts):
        return
    checks = check_bases(Passes(plan.work, torch.device("cpu"), plan.threads))
    for warning in foreign_warnings(plan, [None, *checks[1:]]):
        logger.warning(warning)


def shared_base(resolved: Resolved, base: str, *, is_adapter: bool) -> str:
    """Return the base of a merge whose base the user did not name.

    Args:
        resolved: the models of the merge, with the model from which training started as the base.
        base: its folder or id.
        is_adapter: whether an adapter is trained. It changes the model from which training started, and no other.

    Returns:
        `base`, or the model from which `base` and the other experts were fine-tuned, as their metadata say.

    Raises:
        MergeError: if an expert was trained from another model.
    """
    named = [
        (expert, other_bases(expert, resolved.base)) for expert in resolved.experts[1:]
    ]  # the first is in training
    strangers = [(expert, bases) for expert, bases in named if bases]
    if not strangers:
        return base
    has_adapter_of_it = is_adapter or any(expert.adapter_config and not bases for expert, bases in named)
    for ancestor in named_bases(resolved.base):
        is_shared = all(any(same_name(ancestor, each) for each in bases) for _, bases in strangers)
        if is_shared and not has_adapter_of_it:
            return ancestor
    expert, (other, *_) = strangers[0]
    advice = (
        f"Merge the adapter into {base} when it is trained, and the full model with the other experts."
        if is_adapter
        else f"Pass the model from which all of them were fine-tuned as base_model=, be it {other} or {base}."
    )
    raise MergeError(
        f"Training started from {base}, but {expert.location} says that it was trained from {other}. A change of one "
        f"model does not fit another. {advice} If these are two names of one model, pass base_model={base!r}."
    )
