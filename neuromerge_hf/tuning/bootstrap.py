"""How much of a difference between methods is noise: a paired bootstrap over the examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

SAMPLES = 10_000
AT_A_TIME = 500
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A difference, and the bounds of its confidence interval."""

    difference: float
    low: float
    high: float


def differences(
    best: Mapping[str, Sequence[float]], others: Mapping[str, Mapping[str, Sequence[float]]], seed: int = 0
) -> dict[str, Interval]:
    """How much higher one method's average over the tasks is than each other's.

    The examples of each task are drawn again with replacement, the same ones for all methods. The level is 95% for all
    comparisons together (Bonferroni): each has the level 1 - 0.05 / number of comparisons.

    Args:
        best: the scores by example, by task.
        others: the same of other methods, by their names; the examples are in the same order.
    """
    gaps = {  # (others, examples) for each task
        task: np.array([np.subtract(scores, other[task]) for other in others.values()]) for task, scores in best.items()
    }
    generator = np.random.default_rng(seed)
    drawn = np.zeros((SAMPLES, len(others)))
    for of_task in gaps.values():
        examples = of_task.shape[1]
        for start in range(0, SAMPLES, AT_A_TIME):
            counts = generator.multinomial(examples, np.full(examples, 1 / examples), size=AT_A_TIME)
            drawn[start : start + AT_A_TIME] += counts @ of_task.T / (examples * len(gaps))
    tail = (1 - LEVEL) / 2 / len(others)
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    observed = np.mean([of_task.mean(axis=1) for of_task in gaps.values()], axis=0)
    return {name: Interval(float(observed[i]), float(low[i]), float(high[i])) for i, name in enumerate(others)}
