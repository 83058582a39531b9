"""Which of TRL's trainers can evaluate a merged model in the place of the model in training.

The trainers are told apart by what their sources read: TRL 1.x has the same names in all of them.
"""

from typing import Any

REFERENCE_FREE_AT_BETA_0 = ("GRPOTrainer", "RLOOTrainer")
"""Trainers that use no reference if ``beta`` is 0, the default of the first. Others use theirs all the same."""


def why_not_evaluated(trainer: Any, is_adapter: bool) -> str | None:
    """Return why a trainer cannot evaluate the merge of its model; None if it can.

    Args:
        trainer: any trainer of transformers.
        is_adapter: whether an adapter is trained. It is disabled while the merged weights are evaluated, and many
            trainers take the model without its adapter, or with an earlier one, for the reference.
    """
    name = type(trainer).__name__
    if getattr(trainer, "use_vllm", False):
        return f"{name} generates with vLLM, which has weights of its own: those of the last step, not the merged ones."
    if not is_adapter:
        return None
    if hasattr(trainer.args, "teacher_model_kind"):  # SDFT and SDPO
        return f"The teacher of {name} is the model itself with another adapter or none, and so is the merged model."
    if _uses_its_model_as_reference(trainer):
        return (
            f"{name} compares the model with a reference, which is the model without its adapter, and so is the merged "
            "one: pass a ref_model, or precompute_ref_log_probs=True, where the trainer has that."
        )
    return None


def _uses_its_model_as_reference(trainer: Any) -> bool:
    has_own = getattr(trainer, "ref_model", trainer) is not None  # not every trainer has a reference
    if has_own or getattr(trainer.args, "precompute_ref_log_probs", False):
        return False
    names = {kind.__name__ for kind in type(trainer).__mro__}
    return not (names & set(REFERENCE_FREE_AT_BETA_0) and trainer.beta == 0)
