"""Groups of m, one after the other: keep the n largest of each.

For an m so large that counting within a group vectorises (ranking.py has the kernel for small m). A key is magnitude
+ 1, so 1 is a zero, and 0 is left for a position that is out of the question. Keys are compared LANES at a time: a
comparison gives a word with a bit per key, and the processor counts a word's bits in one instruction.
"""

from functools import cache

import numpy as np

from common.pruners.kernels.bits import LANES, array, ones, which_reach
from common.pruners.kernels.compiler import kernel, njit

_ZERO = 1  # the key of a zero


@njit(nogil=True)
def _count(keys, size, threshold):
    """How many of keys[:size] reach `threshold`, which is at least 1; those behind, up to a whole word, are 0."""
    least, count = keys.dtype.type(threshold), np.int64(0)
    for start in range(0, size, LANES):
        count += ones(which_reach(keys, start, least))
    return count


@njit(nogil=True, inline="always")
def _find(keys, size, k, reached, top, guess, slope):
    """The largest threshold that at least k keys reach, how many do (`reached` reach 1), and a better slope.

    Secant steps from `guess`, where the last group's threshold was: neighbouring groups are alike, so two or three
    counts usually do. `slope` is the distance in keys between neighbours in rank. Halving takes over where steps
    leave the bracket or take too long, so any input ends.
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
        # Only the first step is taken from where groups usually end, so only it says how dense keys are there; an
        # eighth of it, because the next group must not start from one odd group's slope.
        if tries == 0 and after != count:
            slope += np.float32(0.125) * (np.float32(new - at) / np.float32(count - after) - slope)
        at, count, tries = new, after, tries + 1
    return at, k, slope


@njit(nogil=True, inline="always")
def _fill(keys, bits, taken, size, level, magnitude):
    """Fill keys with the positions that `level` earlier vectors kept -> how many those are.

    By a product: for "key if taken[i] == level else 0" LLVM branches at each element on processors without AVX-512,
    which takes five times as long (measured). And in as_key throughout: numba would widen each step to 64 bits, and a
    register would hold a quarter of the keys.
    """
    as_key = keys.dtype.type
    for i in range(size):
        keys[i] = as_key(as_key(as_key(bits[i] & magnitude) + as_key(1)) * as_key(taken[i] == level))
    return _count(keys, size, 1)


@njit(nogil=True, inline="always")
def _fill_with_best_level(keys, bits, taken, size, k, magnitude):
    """Fill keys with the positions among which the k-th best is: those that the fewest earlier vectors kept.

    Returns (how many vectors kept those, how many of k are left for them, how many they are). Zeros are counted: a
    free zero ranks before a taken position and uses up budget, though it is not kept.
    """
    level, left, count = np.uint8(0), k, _fill(keys, bits, taken, size, 0, magnitude)
    while count < left:
        left -= count
        level += np.uint8(1)
        count = _fill(keys, bits, taken, size, level, magnitude)
    return level, left, count


@njit(nogil=True, inline="always")
def _keep_largest(keys, bits, taken, size, k, is_first, magnitude, top, guess, slope, mask):
    """mask = the k positions that rank first, but for zeros; returns threshold and slope, where the next group begins.

    The threshold never falls to a zero's key. That alone drops zeros of the level in question, and ties among them
    need no counting; of a group that holds fewer than k others the next one learns to look there first.
    """
    as_key = keys.dtype.type
    level, left, reached = np.uint8(0), k, np.int64(size)
    if is_first:
        for i in range(size):
            keys[i] = as_key(as_key(bits[i] & magnitude) + as_key(1))
    else:
        level, left, reached = _fill_with_best_level(keys, bits, taken, size, k, magnitude)
    found, reached, slope = _find(keys, size, left, reached, top, guess, slope)
    surplus = reached - left if found > _ZERO else 0
    found = max(found, _ZERO + 1)
    threshold = as_key(found)
    for i in range(size):
        mask[i] = keys[i] >= threshold
    if level:
        for i in range(size):
            mask[i] |= (taken[i] < level) & ((bits[i] & magnitude) != 0)
    # Of those that tie at the threshold the last are too many. From the end, and only in groups that have a surplus:
    # a loop over all positions that counts ties does not vectorise.
    last = size
    for _ in range(surplus):
        last -= 1
        while last > 0 and keys[last] != threshold:
            last -= 1
        mask[last] = 0
    return found, slope


def first_guess(magnitude_bits):
    """Where nm begins to look, float64: the first group's threshold, the distance in keys between neighbours in rank.
    Any guess gives the same masks; both adapt to the data in a few groups, and are left there for the next chunk.
    """
    return np.array([1 << magnitude_bits - 2, 8.0])


@cache
def nm_kernel(as_key, magnitude_bits, is_first, m):
    """The kernel for whole groups of this m; args: n, first_guess(), mask, bits, taken. is_first: `taken` is not read;
    else it ranks before magnitude. as_key: the bits' type.

    m is a constant of the kernel: with a loop length that it knows, LLVM unrolls and leaves no remainder.
    """
    magnitude, top = np.uint32((1 << magnitude_bits) - 1), 1 << magnitude_bits

    @kernel()
    def nm(args, size):
        n, where, mask = args[0], array(args[1], 2, np.float64), array(args[2], size, np.uint8)
        bits, taken = array(args[3], size, as_key), array(args[4], size, np.uint8)
        keys = np.zeros((m + LANES - 1) // LANES * LANES, as_key)  # what is behind m stays 0: out of the question
        guess, slope = np.int64(where[0]), np.float32(where[1])
        for start in range(0, size // m * m, m):
            group, earlier, kept = bits[start : start + m], taken[start : start + m], mask[start : start + m]
            guess, slope = _keep_largest(keys, group, earlier, m, n, is_first, magnitude, top, guess, slope, kept)
        where[0], where[1] = guess, slope
        return 0

    return nm


@cache
def rest_kernel(as_key, magnitude_bits, is_first):
    """The same for what is left behind whole spans, of any m; args: n, m, span, first_guess(), mask, bits, taken. A
    last group of r elements, if it is shorter, keeps ceil(n*r/m). In a kernel of its own, because inside each nm kernel
    it doubled what is compiled.
    """
    magnitude, top = np.uint32((1 << magnitude_bits) - 1), 1 << magnitude_bits

    @kernel()
    def rest(args, size):
        n, m, span, where = args[0], args[1], args[2], array(args[3], 2, np.float64)
        mask, bits, taken = array(args[4], size, np.uint8), array(args[5], size, as_key), array(args[6], size, np.uint8)
        keys = np.zeros((m + LANES - 1) // LANES * LANES, as_key)
        guess, slope = np.int64(where[0]), np.float32(where[1])
        for start in range(size // span * span, size, m):
            group, earlier, kept = bits[start : start + m], taken[start : start + m], mask[start : start + m]
            many = group.size
            keys[many:] = 0  # a shorter last group leaves keys of the one before
            k = (n * many + m - 1) // m
            guess, slope = _keep_largest(keys, group, earlier, many, k, is_first, magnitude, top, guess, slope, kept)
        return 0

    return rest
