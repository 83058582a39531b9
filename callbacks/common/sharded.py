"""Checks that training with sharded weights can give the whole weights."""

from collections.abc import Mapping
from typing import Any

from neuromerge_hf.errors import MergeError


def check_zero(deepspeed_config: Mapping[str, Any]) -> None:
    """Raise a `MergeError` if DeepSpeed cannot give the whole weights with this configuration."""
    zero = deepspeed_config.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise MergeError(
            "DeepSpeed ZeRO-3 keeps the weights in parts, and this callback needs the whole of them. Set "
            '"stage3_gather_16bit_weights_on_model_save": true in "zero_optimization" of the DeepSpeed configuration.'
        )


def is_sharded(strategy: Any) -> bool:
    """Whether a strategy of Lightning shards the weights. Its class is identified by name, as both packages have it.

    Raises:
        MergeError: if the strategy cannot give the whole weights.
    """
    names = {kind.__name__ for kind in type(strategy).__mro__}
    refusal = f"{type(strategy).__name__} keeps the weights in parts, and this callback needs the whole of them. "
    if "DeepSpeedStrategy" in names and strategy.zero_stage_3:
        raise MergeError(refusal + "Train with stage 1 or 2, or merge later with `neuromerge merge`.")
    if "FSDPStrategy" in names and strategy._state_dict_type != "full":
        raise MergeError(refusal + 'Pass FSDPStrategy(state_dict_type="full").')
    if "ModelParallelStrategy" in names and strategy._save_distributed_checkpoint:
        raise MergeError(refusal + "Pass ModelParallelStrategy(save_distributed_checkpoint=False).")
    return bool(names & {"DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy"})
