"""Ranks: which positions to keep, by comparing bit patterns.

A key ranks a position: fewest earlier vectors that kept it, then larger magnitude; among equal keys the lower
index wins. nm_mask ranks runs of m; count_keys and threshold_mask rank scopes of any size in several passes.
"""

from functools import cache

import numpy as np

from common.pruners.kernels.compiler import njit
from common.pruners.kernels.groups import nm_kernel

_CHUNK = 4096  # keys compared at a time
MAGNITUDE_BITS = {"F16": 15, "BF16": 15, "F32": 31}


# --- ranking: keep the n largest of every m -------------------------------------------------------
# Many runs side by side, for a small m: the lanes are runs.


_SIDE_BY_SIDE = 128  # runs ranked together when m is small


@njit(nogil=True, inline="always")
def _key(bits, taken, magnitude, as_key, magnitude_bits, levels):
    """What ranks a position: first fewest earlier vectors that kept it, then larger magnitude."""
    key = as_key(bits & magnitude)
    if levels:
        key = as_key(key | as_key(as_key(levels - taken) << as_key(magnitude_bits)))
    return key


@njit(nogil=True, inline="always")
def _keep_largest_of_each(keys, k, key_bits, thresholds, counts, mask):
    """mask = the k largest keys of each column of keys [m, runs]; among equal keys the first.

    Finds each column's k-th largest key bit by bit from the top: the largest threshold that k keys reach.
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
    counts[:] = k
    for i in range(keys.shape[0]):
        row = keys[i]
        for r in range(_SIDE_BY_SIDE):
            counts[r] = as_key(counts[r] - as_key(row[r] > thresholds[r]))
    for i in range(keys.shape[0]):
        row, kept = keys[i], mask[i]
        for r in range(_SIDE_BY_SIDE):
            tie = as_key(as_key(row[r] == thresholds[r]) & as_key(counts[r] > 0))
            kept[r] = as_key(row[r] > thresholds[r]) | tie
            counts[r] = as_key(counts[r] - tie)


@cache
def _small_nm_kernel(key_dtype, magnitude_bits, levels, m):
    as_key = np.dtype(key_dtype).type
    magnitude = np.uint32((1 << magnitude_bits) - 1)
    key_bits = magnitude_bits + levels.bit_length()
    span = m * _SIDE_BY_SIDE

    @njit(nogil=True, cache=True)
    def nm(bits, taken, n, mask):
        keys, columns = np.empty((m, _SIDE_BY_SIDE), as_key), np.empty((m, _SIDE_BY_SIDE), np.uint8)
        thresholds, counts = np.empty(_SIDE_BY_SIDE, as_key), np.empty(_SIDE_BY_SIDE, as_key)
        for start in range(0, bits.size, span):
            runs, earlier = bits[start : start + span], taken[start : start + span]
            for r in range(_SIDE_BY_SIDE):
                for i in range(m):
                    keys[i, r] = _key(runs[r * m + i], earlier[r * m + i], magnitude, as_key, magnitude_bits, levels)
            _keep_largest_of_each(keys, n, key_bits, thresholds, counts, columns)
            kept = mask[start : start + span]
            for r in range(_SIDE_BY_SIDE):
                for i in range(m):
                    kept[r * m + i] = columns[i, r]

    return nm


_SMALL_M = 48  # up to here ranking runs side by side is faster than one after the other (measured)


def _key_dtype(dtype, levels):
    """The narrowest unsigned integer that holds a magnitude and a count of earlier vectors."""
    bits = MAGNITUDE_BITS[dtype] + levels.bit_length()
    return "uint16" if bits <= 16 else "uint32" if bits <= 32 else "uint64"


def nm_mask(mask, bits, dtype, taken, levels, n, m) -> None:
    """mask, uint8 = n of every m consecutive elements; a last run of r keeps ceil(n*r/m).

    `taken[i]` (uint8) counts the `levels` earlier vectors that kept position i; with levels 0 it is not read.
    Order within a run: fewest earlier vectors, larger magnitude, lower index. Values must be finite.
    Source: CABS, section 3 (n:m balanced sparsification). `bits` starts at a multiple of m.
    """
    taken = taken if levels else mask  # at level 0 any array of the right length: it is not read
    done = 0
    if m <= _SMALL_M:
        done = bits.size // (m * _SIDE_BY_SIDE) * (m * _SIDE_BY_SIDE)
        kernel = _small_nm_kernel(_key_dtype(dtype, levels), MAGNITUDE_BITS[dtype], levels, m)
        kernel(bits[:done], taken[:done], n, mask[:done])
    if done < bits.size:
        key_dtype = "uint16" if MAGNITUDE_BITS[dtype] == 15 else "uint32"
        nm_kernel(key_dtype, MAGNITUDE_BITS[dtype], min(levels, 1), m)(bits[done:], taken[done:], n, mask[done:])


# --- ranking in scopes larger than a block: count keys, then compare with a threshold -------------


@njit(nogil=True, inline="always")
def _fill_keys(keys, bits, taken, magnitude, magnitude_bits, levels):
    for i in range(keys.size):
        keys[i] = _key(bits[i], taken[i], magnitude, keys.dtype.type, magnitude_bits, levels)


@njit(nogil=True, inline="always")
def _mark(keys, low, last, near):
    """near[i] = whether key i lies in low..last -> (how many do, how many lie above); loops that vectorise."""
    as_key = keys.dtype.type
    reached, above = as_key(0), as_key(0)
    for i in range(keys.size):
        near[i] = as_key(keys[i] - low) <= as_key(last - low)
    for i in range(keys.size):
        reached = as_key(reached + as_key(keys[i] >= low))
        above = as_key(above + as_key(keys[i] > last))
    return np.int64(reached) - np.int64(above), np.int64(above)


@cache
def _count_kernel(key_dtype, magnitude_bits, levels):
    as_key = np.dtype(key_dtype).type
    magnitude = np.uint32((1 << magnitude_bits) - 1)

    @njit(nogil=True, cache=True)
    def count(bits, taken, low, last, shift, counts):
        scratch, near, above = np.zeros(_CHUNK, as_key), np.zeros(_CHUNK, np.uint8), np.int64(0)
        eights, which = near.view(np.uint64), np.int64(counts.shape[1] - 1)
        for start in range(0, bits.size, _CHUNK):
            part, earlier = bits[start : start + _CHUNK], taken[start : start + _CHUNK]
            keys = scratch[: part.size]
            _fill_keys(keys, part, earlier, magnitude, magnitude_bits, levels)
            inside, more = _mark(keys, low, last, near)
            near[keys.size :] = 0
            above += more
            if inside > keys.size >> 5:  # many: without branches, which would be guessed wrong
                for i in range(keys.size):
                    counts[i & 1, (np.int64(as_key(keys[i] - low)) >> shift) & which] += near[i]
            else:
                for eight in range(eights.size):
                    if eights[eight]:
                        for i in range(8 * eight, 8 * eight + 8):
                            if near[i]:
                                counts[i & 1, np.int64(as_key(scratch[i] - low)) >> shift] += 1
        return above

    return count


def keys_of(bits, dtype, taken, levels) -> np.ndarray:
    """int64 [elements]: the key of each position (see nm_mask)."""
    found = bits.astype(np.int64) & ((1 << MAGNITUDE_BITS[dtype]) - 1)
    return found if not levels else found | (levels - taken.astype(np.int64)) << MAGNITUDE_BITS[dtype]


def count_keys(counts, bits, dtype, taken, levels, low, high, shift) -> int:
    """Count keys in bins of 2**shift keys each, from `low` to below `high` -> how many keys are `high` and above.

    For the key see nm_mask. counts, int64 [2, a power of two that is at least the bins], is added to, in two banks: of
    runs of equal keys, one would wait for the other.
    """
    key_dtype = _key_dtype(dtype, levels)
    as_key, kernel = np.dtype(key_dtype).type, _count_kernel(key_dtype, MAGNITUDE_BITS[dtype], levels)
    return kernel(bits, taken if levels else bits, as_key(low), as_key(high - 1), shift, counts)


@njit(nogil=True, inline="always")
def _compare(keys, least, mask):
    """mask = keys that reach `least`; how many equal it, counted as wide as a key, so that the loop vectorises."""
    as_key = keys.dtype.type
    tied = as_key(0)
    for i in range(keys.size):
        mask[i] = keys[i] >= least
        tied = as_key(tied + as_key(keys[i] == least))
    return np.int64(tied)


@cache
def _threshold_kernel(key_dtype, magnitude_bits, levels):
    as_key = np.dtype(key_dtype).type
    magnitude = np.uint32((1 << magnitude_bits) - 1)

    @njit(nogil=True, cache=True)
    def threshold(bits, taken, least, ties, mask):
        scratch, left = np.empty(_CHUNK, as_key), ties
        for start in range(0, bits.size, _CHUNK):
            part, earlier, kept = (
                bits[start : start + _CHUNK],
                taken[start : start + _CHUNK],
                mask[start : start + _CHUNK],
            )
            keys = scratch[: part.size]
            _fill_keys(keys, part, earlier, magnitude, magnitude_bits, levels)
            tied = _compare(keys, least, kept)
            if tied > left:  # from here on only the first `left` ties are kept
                for i in range(keys.size):
                    kept[i] = keys[i] > least
                for i in range(keys.size):
                    if left == 0:
                        break
                    if keys[i] == least:
                        kept[i] = 1
                        left -= 1
            else:
                left -= tied
        return ties - left

    return threshold


def threshold_mask(mask, bits, dtype, taken, levels, least, ties) -> int:
    """mask, uint8 = keys above `least` and the first `ties` that equal it -> how many ties it used."""
    key_dtype = _key_dtype(dtype, levels)
    kernel = _threshold_kernel(key_dtype, MAGNITUDE_BITS[dtype], levels)
    return kernel(bits, taken if levels else mask, np.dtype(key_dtype).type(least), ties, mask)
