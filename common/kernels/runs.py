"""Runs of m, one after the other: keep the n largest of each.

For an m so large that counting within a run vectorises (ranking.py has the kernel for small m). A key is magnitude
+ 1, or 0 for a position that is out of the question; it leaves the top bit free, for _count.
"""

from functools import cache

import numpy as np
from numba import njit


@njit(nogil=True, inline="always")
def _count(keys, size, threshold):
    """How many keys reach `threshold`: the sign of a difference is the cheapest comparison of many lanes."""
    as_key, sign = keys.dtype.type, keys.dtype.type(8 * keys.itemsize - 1)
    below, count = as_key(threshold - 1), as_key(0)
    for i in range(size):
        count = as_key(count + as_key(as_key(below - keys[i]) >> sign))
    return np.int64(count)


@njit(nogil=True, inline="always")
def _find(keys, size, k, reached, top, guess, slope):
    """The largest threshold that at least k keys reach, how many do (`reached` reach 1), and a better slope.

    Secant steps from `guess`, where the last run's threshold was; `slope` is the distance in keys between
    neighbours in rank. Halving takes over where steps leave the bracket or take too long, so any input ends.
    """
    low, high, at, tries = np.int64(1), top, guess, 0  # at least k reach low, fewer than k reach high
    count = _count(keys, size, at)
    while count != k:
        if count > k:
            low, reached = at, count
        else:
            high = at
        if high - low == 1:
            return low, reached, slope
        new = at + np.int64(np.float32(count - k) * slope)
        if not low < new < high or tries > 4:
            new = (low + high) >> 1
        after = _count(keys, size, new)
        if tries == 0 and after != count:
            slope += np.float32(0.125) * (np.float32(new - at) / np.float32(count - after) - slope)
        at, count, tries = new, after, tries + 1
    return at, k, slope


@njit(nogil=True, inline="always")
def _best_level(taken, size, k):
    """(the fewest earlier vectors among which the k-th best position is, how many of k are left for that level)."""
    level, left = 0, k
    while True:
        count = np.uint32(0)
        for i in range(size):
            count = np.uint32(count + np.uint32(taken[i] == level))
        if count >= left:
            return np.uint8(level), left, np.int64(count)
        left -= np.int64(count)
        level += 1


@njit(nogil=True, inline="always")
def _keep_largest(keys, bits, taken, size, k, levels, magnitude, top, guess, slope, mask):
    """mask[:size] = the k positions that rank first; returns threshold and slope, where the next run begins."""
    as_key = keys.dtype.type
    level, left, reached = np.uint8(0), k, np.int64(size)
    if levels:
        level, left, reached = _best_level(taken, size, k)
        for i in range(size):
            keys[i] = as_key(as_key(bits[i] & magnitude) + as_key(1)) if taken[i] == level else as_key(0)
    else:
        for i in range(size):
            keys[i] = as_key(as_key(bits[i] & magnitude) + as_key(1))
    found, reached, slope = _find(keys, size, left, reached, top, guess, slope)
    threshold = as_key(found)
    for i in range(size):
        mask[i] = (keys[i] >= threshold) | (taken[i] < level) if levels else keys[i] >= threshold
    last = size
    for _ in range(reached - left):  # of those that tie at the threshold the last are too many
        last -= 1
        while last > 0 and keys[last] != threshold:
            last -= 1
        mask[last] = 0
    return found, slope


@cache
def nm_kernel(key_dtype, magnitude_bits, levels, m):
    """The kernel for this m: nm(bits, taken, n, mask). `levels` 0: `taken` is not read; else: it ranks first."""
    as_key = np.dtype(key_dtype).type
    magnitude, top = np.uint32((1 << magnitude_bits) - 1), 1 << magnitude_bits

    @njit(nogil=True, cache=True)
    def nm(bits, taken, n, mask):
        keys, guess, slope = np.empty(m, as_key), np.int64(top >> 2), np.float32(8.0)
        full = bits.size // m * m
        for start in range(0, full, m):
            run, earlier, kept = bits[start : start + m], taken[start : start + m], mask[start : start + m]
            guess, slope = _keep_largest(keys, run, earlier, m, n, levels, magnitude, top, guess, slope, kept)
        rest = bits.size - full
        if rest:
            k, run, earlier, kept = (n * rest + m - 1) // m, bits[full:], taken[full:], mask[full:]
            _keep_largest(keys, run, earlier, rest, k, levels, magnitude, top, guess, slope, kept)

    return nm
