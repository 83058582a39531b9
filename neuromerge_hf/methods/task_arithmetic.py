"""Task Arithmetic (Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv:2212.04089)."""

from torch import Tensor

from neuromerge_hf.config import TaskArithmeticConfig
from neuromerge_hf.engine.method import Method, Recorder, add_change, summed
from neuromerge_hf.sources.unit import Unit
from neuromerge_hf.storage.layout import Block


def add_tasks(task_vectors: Tensor, scale: float) -> Tensor:
    """``scale * sum_t tau_t`` (section 2), from `task_vectors` (T, ...) float32."""
    return summed(task_vectors).mul_(scale)


class TaskArithmetic(Method[TaskArithmeticConfig]):
    """Task Arithmetic on the experts of a plan."""

    def merge_block(self, x: Tensor, unit: Unit, block: Block, record: Recorder) -> Tensor:
        return add_change(x[0], add_tasks(x[1:], self.config.scale))
