"""A paired bootstrap over the examples, which tells differences between methods from noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

SAMPLES = 10_000
BATCH_SIZE = 500
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A difference of average scores, and the bounds of its confidence interval."""

    difference: float
    low: float
    high: float


def differences(
    best: Mapping[str, Sequence[float]], others: Mapping[str, Mapping[str, Sequence[float]]], seed: int = 0
) -> dict[str, Interval]:
    """The best method's lead over each other method, in the average over the tasks.

    The examples of each task are resampled with replacement, the same ones for all methods. The level is 95% for all
    comparisons together (Bonferroni): each interval has the level 1 - 0.05 / number of comparisons.

    Args:
        best: the best method's scores by example, by task.
        others: the other methods' scores, by method name. Their examples are in the same order.
        seed: the seed of the resampling.

    Returns:
        The lead with its confidence interval, by method name.
    """
    gaps = {  # (others, examples) for each task
        task: np.array([np.subtract(scores, other[task]) for other in others.values()]) for task, scores in best.items()
    }
    generator = np.random.default_rng(seed)
    drawn = np.zeros((SAMPLES, len(others)))
    for gap in gaps.values():
        examples = gap.shape[1]
        for start in range(0, SAMPLES, BATCH_SIZE):
            counts = generator.multinomial(examples, np.full(examples, 1 / examples), size=BATCH_SIZE)
            drawn[start : start + BATCH_SIZE] += counts @ gap.T / (examples * len(gaps))
    tail = (1 - LEVEL) / 2 / len(others)
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    observed = np.mean([gap.mean(axis=1) for gap in gaps.values()], axis=0)
    return {name: Interval(float(observed[i]), float(low[i]), float(high[i])) for i, name in enumerate(others)}
