"""The methods of merging: NeuroMerging, and those that it is compared with, through the same engine.

Each module holds one method as pure functions on the task vectors of a block, and a small class that finds what the
method needs of the whole model (thresholds) and then merges block by block.
"""

from collections.abc import Callable
from typing import Any

import torch

from neuromerge_hf.config import (
    AverageConfig,
    DARETIESConfig,
    MergeConfig,
    NeuroMergingConfig,
    PCBConfig,
    TaskArithmeticConfig,
    TIESConfig,
)
from neuromerge_hf.engine.method import Method
from neuromerge_hf.methods.average import Average
from neuromerge_hf.methods.dare import DARETIES
from neuromerge_hf.methods.neuromerging import NeuroMerging
from neuromerge_hf.methods.pcb import PCB
from neuromerge_hf.methods.task_arithmetic import TaskArithmetic
from neuromerge_hf.methods.ties import TIES
from neuromerge_hf.planning.plan import MergePlan

METHODS: dict[type[MergeConfig], type[Method[Any]]] = {
    NeuroMergingConfig: NeuroMerging,
    AverageConfig: Average,
    TaskArithmeticConfig: TaskArithmetic,
    TIESConfig: TIES,
    DARETIESConfig: DARETIES,
    PCBConfig: PCB,
}


def fit_method(
    plan: MergePlan, device: torch.device, threads: int, advance: Callable[[int], object] = lambda _: None
) -> Method[Any]:
    """The method of a plan, with what it needs of the whole model, for which the inputs are read.

    Args:
        advance: called with the number of bytes that have been read.

    Raises:
        MergeError: if a weight is NaN or infinite.
    """
    return METHODS[type(plan.config)].fit(plan.config, plan, device, threads, advance)
