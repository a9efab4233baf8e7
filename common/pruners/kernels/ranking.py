"""Ranks: which positions to keep, by comparing bit patterns.

A key ranks a position: fewest earlier vectors that kept it, then larger magnitude; among equal keys the lower
index wins. Of the positions that rank first, those whose value is zero are not kept: they would change nothing, and
later vectors may have them. nm_mask ranks groups of m; count_keys and threshold_mask rank scopes of any size in
several passes.

A *block* is what a caller passes in one call, a *chunk* what fits the first-level cache: a kernel goes over a chunk
several times, in loops so simple that each vectorises.
"""

from functools import cache

import numpy as np

from common.pruners.kernels.bits import LANES, array, lowest, ones, which_exceed, which_reach
from common.pruners.kernels.compiler import Step, in_steps, kernel, njit
from common.pruners.kernels.groups import first_guess, nm_kernel, rest_kernel

_CHUNK = 4096  # keys; as 16-bit keys and their bytes of mask they take 12 kB of a first-level cache of 32 to 48 kB
MAGNITUDE_BITS = {"F16": 15, "BF16": 15, "F32": 31}
_WORD = {15: np.uint16, 31: np.uint32}  # what bits are held in, by how many of them are a magnitude


# --- keys -----------------------------------------------------------------------------------------


@njit(nogil=True, inline="always")
def _key(bits, taken, magnitude, as_key, magnitude_bits, levels):
    """What ranks a position: first fewest earlier vectors that kept it, then larger magnitude.

    Each step is cast back to the width of a key: numba computes integers in 64 bits, which would halve or quarter
    the number of keys in a register. Kernels for the first vector have 0 for `levels` when they are compiled, so that
    nothing is left of it; one kernel serves all later vectors whose keys are as wide.
    """
    key = as_key(bits & magnitude)
    if levels:
        key = as_key(key | as_key(as_key(levels - taken) << as_key(magnitude_bits)))
    return key


def _key_dtype(dtype, levels):
    """The narrowest unsigned integer that holds a magnitude and a count of earlier vectors."""
    bits = MAGNITUDE_BITS[dtype] + levels.bit_length()
    return "uint16" if bits <= 16 else "uint32" if bits <= 32 else "uint64"


def keys_of(bits, dtype, taken, levels) -> np.ndarray:
    """int64 [elements]: the key of each position (see nm_mask)."""
    found = bits.astype(np.int64) & ((1 << MAGNITUDE_BITS[dtype]) - 1)
    return found if not levels else found | (levels - taken.astype(np.int64)) << MAGNITUDE_BITS[dtype]


# --- ranking: keep the n largest of every m -------------------------------------------------------
# Many groups side by side, for a small m: the lanes are groups. groups.py has the kernel for large m.


# Groups ranked together when m is small: a multiple of every register's lanes, and few enough that keys and columns of
# the largest small m (48 * 128 * 3 bytes = 18 kB) stay in the first-level cache.
_SIDE_BY_SIDE = 128


@njit(nogil=True, inline="always")
def _keep_largest_of_each(keys, k, key_bits, magnitude, thresholds, counts, mask):
    """mask = the k largest keys of each column of keys [m, groups], but for zeros; among equal keys the first.

    Finds each column's k-th largest key bit by bit from the top: the largest threshold that k keys reach. So every
    column takes the same steps, whatever its values, and the inner loops run over columns without a branch.
    """
    as_key = keys.dtype.type
    thresholds[:] = 0
    for bit in range(key_bits - 1, -1, -1):
        one = as_key(as_key(1) << as_key(bit))
        counts[:] = 0
        for i in range(keys.shape[0]):
            row = keys[i]
            for r in range(_SIDE_BY_SIDE):
                counts[r] = as_key(counts[r] + as_key(row[r] >= as_key(thresholds[r] | one)))
        for r in range(_SIDE_BY_SIDE):
            thresholds[r] = as_key(thresholds[r] | one) if counts[r] >= k else thresholds[r]
    counts[:] = k  # from here on: how many ties at the threshold are still to be kept
    for i in range(keys.shape[0]):
        row = keys[i]
        for r in range(_SIDE_BY_SIDE):
            counts[r] = as_key(counts[r] - as_key(row[r] > thresholds[r]))
    for i in range(keys.shape[0]):
        row, kept = keys[i], mask[i]
        for r in range(_SIDE_BY_SIDE):
            tie = as_key(as_key(row[r] == thresholds[r]) & as_key(counts[r] > 0))
            # Zeros are left out last: a tie that is zero, or a free zero above taken values, has used its budget.
            kept[r] = (as_key(row[r] > thresholds[r]) | tie) & as_key(as_key(row[r] & magnitude) > as_key(0))
            counts[r] = as_key(counts[r] - tie)


@cache
def _small_nm_kernel(key_dtype, magnitude_bits, is_first, m):
    as_key, word = np.dtype(key_dtype).type, _WORD[magnitude_bits]
    magnitude = as_key((1 << magnitude_bits) - 1)
    span = m * _SIDE_BY_SIDE

    @kernel()
    def nm(args, size):
        # args: n, levels, key_bits | mask, bits, taken
        n, levels, key_bits = args[0], 0 if is_first else args[1], magnitude_bits if is_first else args[2]
        mask, bits, taken = array(args[3], size, np.uint8), array(args[4], size, word), array(args[5], size, np.uint8)
        keys, columns = np.empty((m, _SIDE_BY_SIDE), as_key), np.empty((m, _SIDE_BY_SIDE), np.uint8)
        thresholds, counts = np.empty(_SIDE_BY_SIDE, as_key), np.empty(_SIDE_BY_SIDE, as_key)
        for start in range(0, size // span * span, span):
            groups, earlier = bits[start : start + span], taken[start : start + span]
            # Transposed on the way in and out, so that a group is a column and a register holds one key of each.
            for r in range(_SIDE_BY_SIDE):
                for i in range(m):
                    keys[i, r] = _key(groups[r * m + i], earlier[r * m + i], magnitude, as_key, magnitude_bits, levels)
            _keep_largest_of_each(keys, n, key_bits, magnitude, thresholds, counts, columns)
            kept = mask[start : start + span]
            for r in range(_SIDE_BY_SIDE):
                for i in range(m):
                    kept[r * m + i] = columns[i, r]
        return 0

    return nm


_SMALL_M = 48  # up to here ranking groups side by side is faster than one after the other (measured)


@in_steps
def nm_mask(mask, bits, dtype, taken, levels, n, m) -> list[Step]:
    """mask, uint8 = the n of every m consecutive elements that rank first (of a last group of r, ceil(n*r/m)), but for
    zeros.

    `taken[i]` (uint8) counts the `levels` earlier vectors that kept position i; with levels 0 it is not read.
    Order within a group: fewest earlier vectors, larger magnitude, lower index. Values must be finite.
    Source: CABS, section 3 (n:m balanced sparsification). `bits` starts at a multiple of m.

    n 2, m 4: [4, -3, 2, 1] -> [1, 1, 0, 0]; [0, -3, 0, 0] -> [0, 1, 0, 0], not two.
    """
    taken = taken if levels else mask  # at level 0 any array of the right length: it is not read
    word, magnitude_bits = _WORD[MAGNITUDE_BITS[dtype]], MAGNITUDE_BITS[dtype]
    span, steps = m * _SIDE_BY_SIDE if m <= _SMALL_M else m, []
    if bits.size >= span and m <= _SMALL_M:
        side_by_side = _small_nm_kernel(_key_dtype(dtype, levels), magnitude_bits, levels == 0, m)
        steps.append(Step(side_by_side, (mask, bits, taken), (n, levels, magnitude_bits + levels.bit_length())))
    elif bits.size >= span:
        ranking = nm_kernel(word, magnitude_bits, levels == 0, m)
        steps.append(Step(ranking, (mask, bits, taken), (n, first_guess(magnitude_bits))))
    if bits.size % span:  # a kernel of its own, compiled once for every m
        rest = rest_kernel(word, magnitude_bits, levels == 0)
        steps.append(Step(rest, (mask, bits, taken), (n, m, span, first_guess(magnitude_bits))))
    return steps


# --- ranking in scopes larger than a block: count keys, then compare with a threshold -------------


@njit(nogil=True, inline="always")
def _fill_keys(keys, bits, taken, magnitude, magnitude_bits, levels):
    for i in range(keys.size):
        keys[i] = _key(bits[i], taken[i], magnitude, keys.dtype.type, magnitude_bits, levels)


@cache
def _count_kernel(key_dtype, magnitude_bits, is_first):
    as_key, word = np.dtype(key_dtype).type, _WORD[magnitude_bits]
    magnitude = np.uint32((1 << magnitude_bits) - 1)

    @kernel()
    def count(args, size):
        # args: low, last, shift, bins, counts, above, levels | bits, taken
        low, last, shift, bins = as_key(args[0]), as_key(args[1]), args[2], args[3]
        counts, above, levels = array(args[4], bins, np.int64), np.int64(0), 0 if is_first else args[6]
        bits, taken = array(args[7], size, word), array(args[8], size, np.uint8)
        scratch = np.zeros(_CHUNK, as_key)
        for start in range(0, size, _CHUNK):
            part, earlier = bits[start : start + _CHUNK], taken[start : start + _CHUNK]
            keys = scratch[: part.size]
            _fill_keys(keys, part, earlier, magnitude, magnitude_bits, levels)
            # A word of bits at a time, one for each key in between: most have none or one, and finding those takes
            # neither a branch nor a bin for each key.
            for first in range(0, keys.size, LANES):
                over = which_exceed(scratch, first, last)
                near = np.uint32(which_reach(scratch, first, low) & ~over)
                if keys.size - first < LANES:  # the last chunk is shorter, behind it is what the one before it left
                    behind = np.uint32(np.uint32(1) << np.uint32(keys.size - first)) - np.uint32(1)
                    over, near = np.uint32(over & behind), np.uint32(near & behind)
                above += ones(over)
                while near:
                    counts[np.int64(as_key(scratch[first + lowest(near)] - low)) >> shift] += 1
                    near &= near - np.uint32(1)
        array(args[5], 1, np.int64)[0] += above
        return 0

    return count


@in_steps
def count_keys(counts, above, bits, dtype, taken, levels, low, high, shift) -> list[Step]:
    """Count keys in bins of 2**shift keys each, from `low` to below `high`; above, how many keys are `high` and more.

    For the key see nm_mask. counts, int64 [bins], and above, int64 [1], are added to.
    """
    counting = _count_kernel(_key_dtype(dtype, levels), MAGNITUDE_BITS[dtype], levels == 0)
    # `high` itself may be one more than a key can hold, so the kernel is given the last key that counts.
    numbers = (low, high - 1, shift, counts.size, counts, above, levels)
    return [Step(counting, (bits, taken if levels else bits), numbers)]


@njit(nogil=True, inline="always")
def _compare(keys, least, magnitude, levels, mask):
    """mask = keys that reach `least` and are no zeros; how many keys equal it.

    Counted as wide as a key, so that the loop vectorises; a chunk's 4096 fit. Without levels only key 0 is a zero's,
    and one comparison does; with levels each has one.
    """
    as_key = keys.dtype.type
    tied, floor = as_key(0), max(least, as_key(1))
    for i in range(keys.size):
        if levels:
            mask[i] = as_key(keys[i] >= least) & as_key(as_key(keys[i] & magnitude) > as_key(0))
        else:
            mask[i] = keys[i] >= floor
        tied = as_key(tied + as_key(keys[i] == least))
    return np.int64(tied)


@cache
def _threshold_kernel(key_dtype, magnitude_bits, is_first):
    as_key, word = np.dtype(key_dtype).type, _WORD[magnitude_bits]
    magnitude = as_key((1 << magnitude_bits) - 1)

    @kernel()
    def threshold(args, size):
        # args: least, ties, levels | mask, bits, taken
        least, ties, levels = as_key(args[0]), array(args[1], 1, np.int64), 0 if is_first else args[2]
        mask, bits, taken = array(args[3], size, np.uint8), array(args[4], size, word), array(args[5], size, np.uint8)
        scratch, left, has_value = np.empty(_CHUNK, as_key), ties[0], np.uint8(as_key(least & magnitude) > as_key(0))
        for start in range(0, size, _CHUNK):
            part, earlier = bits[start : start + _CHUNK], taken[start : start + _CHUNK]
            kept, keys = mask[start : start + _CHUNK], scratch[: part.size]
            _fill_keys(keys, part, earlier, magnitude, magnitude_bits, levels)
            tied = _compare(keys, least, magnitude, levels, kept)
            if tied > left:  # only the first `left` ties are kept: all are taken out, and those put back one by one
                for i in range(keys.size):
                    kept[i] &= keys[i] != least
                for i in range(keys.size):
                    if left == 0:
                        break
                    if keys[i] == least:
                        kept[i] = has_value
                        left -= 1
            else:
                left -= tied
        ties[0] = left
        return 0

    return threshold


@in_steps
def threshold_mask(mask, bits, dtype, taken, levels, least, ties) -> list[Step]:
    """mask, uint8 = keys above `least` and the first ties[0] that equal it, but for zeros; ties, int64 [1], is counted
    down.

    A tie that is zero is counted, though not kept: it is among those that rank first.
    """
    comparing = _threshold_kernel(_key_dtype(dtype, levels), MAGNITUDE_BITS[dtype], levels == 0)
    return [Step(comparing, (mask, bits, taken if levels else mask), (least, ties, levels))]


# --- what was drawn and not ranked ----------------------------------------------------------------


@cache
def _drop_kernel(magnitude_bits):
    magnitude, word = np.uint32((1 << magnitude_bits) - 1), _WORD[magnitude_bits]

    @kernel()
    def drop(args, size):
        mask, bits = array(args[0], size, np.uint8), array(args[1], size, word)
        for i in range(size):
            mask[i] &= (bits[i] & magnitude) != 0
        return 0

    return drop


@in_steps
def drop_zeros(mask, bits, dtype) -> list[Step]:
    """In place: mask, uint8, where the values are not zero; for random masks, once no later draw needs them."""
    return [Step(_drop_kernel(MAGNITUDE_BITS[dtype]), (mask, bits))]


# --- how many earlier vectors kept a position -----------------------------------------------------


@cache
def _count_taken_kernel():
    @kernel()
    def count_taken(args, size):
        taken, before = array(args[0], size, np.uint8), array(args[1], size, np.uint8)
        mask = array(args[2], size, np.uint8)
        for i in range(size):
            taken[i] = before[i] + mask[i]
        return 0

    return count_taken


@in_steps
def count_taken(taken, before, mask) -> list[Step]:
    """taken, uint8 = before + mask."""
    return [Step(_count_taken_kernel(), (taken, before, mask))]
