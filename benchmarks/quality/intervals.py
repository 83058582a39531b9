"""Confidence intervals of differences between methods, by a paired bootstrap over the examples."""

from collections.abc import Mapping, Sequence

import numpy as np

SAMPLES = 4000

Difference = tuple[float, float, float]
"""A mean difference in points, and the bounds of its 95% interval."""


def difference(ours: Mapping[str, Sequence[str]], other: Mapping[str, Sequence[str]]) -> Difference:
    """Return how much better `ours` is than `other`, on average over the tasks.

    The examples of each task are drawn again with replacement, the same ones for both methods and for all seeds. The
    interval is that of the examples: it tells nothing of further tasks or further trainings.

    Args:
        ours: for each task, the answers of each training seed, as "1" (right) and "0" (wrong).
        other: the same of the other method.
    """
    generator = np.random.default_rng(0)
    total = np.zeros(SAMPLES)
    middle = 0.0
    for task in ours:
        points = 100 * (_bits(ours[task]) - _bits(other[task])).mean(0)  # of each example
        counts = generator.multinomial(len(points), np.full(len(points), 1 / len(points)), SAMPLES)
        total += counts @ points / len(points) / len(ours)
        middle += points.mean() / len(ours)
    low, high = np.quantile(total, [0.025, 0.975])
    return float(middle), float(low), float(high)


def _bits(answers: Sequence[str]) -> np.ndarray:
    return np.array([[float(bit) for bit in seed] for seed in answers])
