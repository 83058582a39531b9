"""The loops over the entries of neurons, compiled for the CPU by numba (``pip install neuromerge-hf[fast]``).

Together they do what `kernel.trim`, `kernel.gram_matrix` and the last step of `kernel.merge_neurons` do, which define
it, but straight from the stored bytes, and a few hundred entries at a time, which stay in a core's first cache.

A *block* is (1 + T, neurons, width): the base, and the T experts that change it. Its entries are float32 (the base's
weights and the task vectors), or uint16: the bits of bfloat16 weights as the base and the experts store them, whose
differences are formed here. Every number of a neuron depends on the neuron's own rows alone. Python's lock is released.

numba compiles a function when it is first called with a type of entries, which takes a second or two, and keeps the
machine code in its cache. Importing this module needs numba.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload, register_jitable

CHUNK = 512
"""How many entries of a row are processed at a time. A multiple of 8."""

SUMS = {"reassoc", "contract"}
"""What the compiler may assume: sums may be reordered, for wide registers. NaN and infinity keep their meaning."""


def _compiled(function: Callable[..., Any]) -> Any:
    try:
        return njit(function, cache=True, nogil=True, fastmath=SUMS)
    except RuntimeError:  # no place that numba knows for its cache can be written to
        return njit(function, nogil=True, fastmath=SUMS)


@_compiled
def gram_matrix(x, thresholds, gram):
    """Write the inner products of each neuron's trimmed rows.

    Args:
        x: (1 + T, neurons, width) uint16 or float32, a block.
        thresholds: (T,) float32, the trim thresholds of the task vectors; 0 keeps everything.
        gram: (neurons, 1 + T, 1 + T) float64, the result.
    """
    rows, neurons, width = x.shape
    even = rows + rows % 2
    chunk = np.empty((rows, CHUNK), np.float32)
    exact = np.zeros((even, CHUNK), np.float64)  # in pairs of rows, the last one may be empty
    products = np.empty((even, even), np.float64)
    for neuron in range(neurons):
        products[:] = 0
        for start in range(0, width, CHUNK):
            stop = min(start + CHUNK, width)
            _load(x, neuron, start, stop, thresholds, chunk)
            for row in range(rows):
                _copy(chunk[row], exact[row], stop - start)
            for one in range(0, even, 2):
                for other in range(one, even, 2):
                    a, b, c, d = exact[one], exact[one + 1], exact[other], exact[other + 1]
                    ac, ad, bc, bd = 0.0, 0.0, 0.0, 0.0
                    for i in range(stop - start):  # four sums at a time read every number half as often as one
                        ac += a[i] * c[i]
                        ad += a[i] * d[i]
                        bc += b[i] * c[i]
                        bd += b[i] * d[i]
                    products[one, other] += ac
                    products[one, other + 1] += ad
                    products[one + 1, other] += bc
                    products[one + 1, other + 1] += bd
        for one in range(rows):
            for other in range(one, rows):
                gram[neuron, one, other] = gram[neuron, other, one] = products[one, other]


@_compiled
def combine(x, thresholds, coefficients, merged):
    """Write ``w_0 + a @ X`` for each neuron with the trimmed rows X. If all of ``a`` is 0, it is ``w_0`` to the bit.

    Args:
        x: (1 + T, neurons, width) uint16 or float32, a block.
        thresholds: (T,) float32, the trim thresholds of the task vectors.
        coefficients: (neurons, 1 + T) float32, the numbers ``a``.
        merged: (neurons, width), the result: float32, or uint16 for the bits of the nearest bfloat16.
    """
    rows, neurons, width = x.shape
    base, task_vector, total = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for neuron in range(neurons):
        is_changed = np.any(coefficients[neuron] != 0)
        for start in range(0, width, CHUNK):
            stop = min(start + CHUNK, width)
            _load_base(x[0, neuron, start:stop], base)
            _copy(base, total, stop - start)
            for row in range(rows if is_changed else 0):
                if row > 0:
                    _load_task(x[row, neuron, start:stop], base, thresholds[row - 1], task_vector)
                values, coefficient = (task_vector if row > 0 else base), coefficients[neuron, row]
                for i in range(stop - start):
                    total[i] += coefficient * values[i]
            _store(total, merged[neuron, start:stop])


@_compiled
def count_magnitudes(x, row, low, high, norms, found):
    """Count the magnitudes of a task vector below a range, and find those in the range.

    Args:
        x: (1 + T, neurons, width) uint16 or float32, a block.
        row: which row of the block, from 1 to T.
        low, high: float32, the range [low, high).
        norms: (2, neurons) float64, which get the sum of all magnitudes and that of those not below the range.
        found: (at least neurons * width,) int32, which gets the bits of the magnitudes in the range, in their order.

    Returns:
        The number of magnitudes below the range, and the number of those in it.
    """
    _, neurons, width = x.shape
    base, magnitudes = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    is_inside = np.zeros(CHUNK, np.uint8)
    eights = is_inside.view(np.uint64)
    below, inside = 0, 0
    for neuron in range(neurons):
        norm, kept_norm = 0.0, 0.0
        for start in range(0, width, CHUNK):
            count = min(CHUNK, width - start)
            _load_base(x[0, neuron, start : start + count], base)
            _load_task(x[row, neuron, start : start + count], base, np.float32(0), magnitudes)
            # Numbers of one type, so that the loop uses wide registers. A chunk's counts are exact in float32.
            total, kept, smaller = np.float32(0), np.float32(0), np.float32(0)
            for i in range(count):
                magnitude = abs(magnitudes[i])
                magnitudes[i] = magnitude
                is_below = magnitude < low
                total += magnitude
                kept += np.float32(0) if is_below else magnitude
                smaller += np.float32(1) if is_below else np.float32(0)
            norm += total
            kept_norm += kept
            below += int(smaller)
            for i in range(count):
                is_inside[i] = (magnitudes[i] >= low) & (magnitudes[i] < high)
            is_inside[count:] = 0
            for eight in range((count + 7) // 8):
                if eights[eight]:  # rare, as the range is narrow
                    for i in range(8 * eight, 8 * eight + 8):
                        if is_inside[i]:
                            found[inside] = np.float32(magnitudes[i]).view(np.int32)
                            inside += 1
        norms[0, neuron] = norm
        norms[1, neuron] = kept_norm
    return below, inside


@register_jitable
def _copy(values, copies, count):
    for i in range(count):
        copies[i] = values[i]


@register_jitable
def _load(x, neuron, start, stop, thresholds, chunk):
    """Load a part of a neuron's rows, and trim the task vectors: (1 + T, CHUNK) float32."""
    base = chunk[0]
    _load_base(x[0, neuron, start:stop], base)
    for row in range(1, x.shape[0]):
        task_vector = chunk[row]
        _load_task(x[row, neuron, start:stop], base, thresholds[row - 1], task_vector)


def _load_base(stored, base):
    """Load a part of a neuron's old weights into float32."""


def _load_task(stored, base, threshold, task_vector):
    """Load the same part of a task vector into float32."""


def _store(values, stored):
    """Store float32 values: in float32, or as the bits of bfloat16."""


@overload(_load_base)
def _of_base(stored, base):
    def floats(stored, base):
        for i in range(len(stored)):
            base[i] = stored[i]

    def bits(stored, base):
        for i in range(len(stored)):
            base[i] = _from_bfloat16(stored[i])

    return bits if stored.dtype == types.uint16 else floats


@overload(_load_task)
def _of_task(stored, base, threshold, task_vector):
    def floats(stored, base, threshold, task_vector):
        for i in range(len(stored)):
            task_vector[i] = _trimmed(stored[i], threshold)

    def bits(stored, base, threshold, task_vector):
        for i in range(len(stored)):
            task_vector[i] = _trimmed(_from_bfloat16(stored[i]) - base[i], threshold)

    return bits if stored.dtype == types.uint16 else floats


@overload(_store)
def _of_stored(values, stored):
    def floats(values, stored):
        for i in range(len(stored)):
            stored[i] = values[i]

    def bits(values, stored):
        for i in range(len(stored)):
            stored[i] = _to_bfloat16(values[i])

    return bits if stored.dtype == types.uint16 else floats


@register_jitable
def _trimmed(entry, threshold):
    return np.float32(0) if abs(entry) < threshold else entry  # a NaN stays, so that the caller finds it


@register_jitable
def _from_bfloat16(bits):
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@register_jitable
def _to_bfloat16(value):
    """Round to the nearest bfloat16, and to the even one of two that are equally near."""
    bits = np.float32(value).view(np.uint32)
    is_odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + is_odd)
    return np.uint16(0x7FC0) if value != value else np.uint16(np.uint32(rounded >> np.uint32(16)))
