"""What a merge costs, estimated from its plan."""

from neuromerge_hf.config import NeuroMergingConfig
from neuromerge_hf.engine.histogram import BINS
from neuromerge_hf.engine.passes import BLOCK_ENTRIES
from neuromerge_hf.engine.sample import SAMPLE_ENTRIES
from neuromerge_hf.kernel import ALIGNMENT
from neuromerge_hf.planning.plan import MergePlan
from neuromerge_hf.sources.unit import Unit

START_MEMORY = 300_000_000
"""Python, torch and transformers, in bytes."""

START_SECONDS = 6
"""Loading torch and transformers."""

OTHER_METHODS = 32
"""What other methods hold of a block beside it, in bytes an entry: sums, counts, scores, or random numbers."""

VALUES_PER_SECOND = 150_000_000
"""How many entries of the base and of task vectors a thread works on: 130 to 210 million in the benchmarks."""


def memory_needed(plan: MergePlan) -> int:
    """The private memory of a merge on the CPU, in bytes: mapped files, which the kernel may drop, are not counted.

    What is loaded at the start stays; of LoRA adapters, the factors of one tensor. Each thread has a block of the base
    and of the T experts that change it in float32, as it was read (8 bytes an entry), as it is merged (4) and as it is
    written (4); a padded copy where neurons do not fill whole cache lines. If values are trimmed there are, for each
    expert, the counters and the sample that predicts the threshold, which is copied twice while it is sorted. The
    largest head is held while it is written. What preparing an adapter takes is not counted.
    """
    untrimmed = isinstance(plan.config, NeuroMergingConfig) and plan.config.density == 1
    experts = 0 if untrimmed or plan.config.passes == 1 else len(plan.experts)
    trimming = experts * (8 * BINS + 4 * SAMPLE_ENTRIES) + (8 * SAMPLE_ENTRIES if experts else 0)
    blocks = plan.threads * max(map(_block_memory, plan.units))
    if not isinstance(plan.config, NeuroMergingConfig):
        blocks += plan.threads * BLOCK_ENTRIES * OTHER_METHODS
    heads = max((expert.head.nbytes for expert in plan.experts if expert.head), default=0)
    return START_MEMORY + _factors(plan) + trimming + blocks + heads


def seconds_needed(plan: MergePlan) -> float:
    """The time of a merge on a CPU without the download, in seconds. Machines differ, so this is very rough.

    Each pass works on every entry of the base and of the T experts that change it: the pass that merges, and before
    it, if values are trimmed, the pass that finds the thresholds.
    """
    passes = plan.config.passes
    merged = sum(unit.entries * (1 + len(unit.changing)) for unit in plan.units if unit.task_vectors)
    copied = sum(unit.entries for unit in plan.units if not unit.task_vectors)
    return START_SECONDS + (passes * merged + copied) / (VALUES_PER_SECOND * plan.threads)


def _block_memory(unit: Unit) -> int:
    entries = min(unit.layout.rows, max(1, BLOCK_ENTRIES // max(1, unit.layout.width))) * unit.layout.width
    rows = 4 * (1 + len(unit.changing))
    padded = unit.is_neuronal and unit.layout.width % (ALIGNMENT // 4) != 0
    return entries * (rows * (1 + padded) + 8 + 4 + 4) if unit.task_vectors else entries * unit.dtype.itemsize


def _factors(plan: MergePlan) -> int:
    """The factors of the LoRA adapters of one tensor in float32, which are in memory while it is merged."""
    return max(
        4 * (unit.layout.rows + unit.layout.width) * sum(getattr(vector, "rank", 0) for vector in unit.task_vectors)
        for unit in plan.units
    )
