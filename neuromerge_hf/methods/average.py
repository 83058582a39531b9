"""Simple averaging: the mean of the experts' weights. An expert that leaves a parameter alone has the base's there."""

from torch import Tensor

from neuromerge_hf.config import AverageConfig
from neuromerge_hf.engine.method import Method, Recorder, add_change, summed
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.layout import Block


def average(task_vectors: Tensor, experts: int) -> Tensor:
    """The mean of the task vectors of all experts.

    Args:
        task_vectors: (T, ...) float32, of the experts that change the parameter.
        experts: how many there are in all.
    """
    return summed(task_vectors).div_(experts)


class Average(Method[AverageConfig]):
    """Simple averaging of the experts of a plan."""

    def merge_block(self, x: Tensor, unit: Unit, block: Block, record: Recorder) -> Tensor:
        return add_change(x[0], average(x[1:], len(unit.task_vectors)))
