"""Random numbers by position: Philox4x32-10."""

import numpy as np
from numba import njit

_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


@njit(nogil=True, inline="always")
def _philox_round(c, key0, key1, step):
    """Round number `step` of ten, on 32-bit words held in 64 bits."""
    k0 = (key0 + np.uint64(step) * np.uint64(0x9E3779B9)) & _LOW
    k1 = (key1 + np.uint64(step) * np.uint64(0xBB67AE85)) & _LOW
    a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
    return (b >> _HALF) ^ c[1] ^ k0, b & _LOW, (a >> _HALF) ^ c[3] ^ k1, a & _LOW


@njit(nogil=True, cache=True)
def _philox_kernel(first, key0, key1, word0, word1, word2, word3):
    for i in range(word0.size):
        counter = np.uint64(first + np.uint64(i))
        c = counter & _LOW, counter >> _HALF, np.uint64(0), np.uint64(0)
        c = _philox_round(
            _philox_round(c, key0, key1, 0), key0, key1, 1
        )  # unrolled, the loop over i vectorises
        c = _philox_round(_philox_round(c, key0, key1, 2), key0, key1, 3)
        c = _philox_round(_philox_round(c, key0, key1, 4), key0, key1, 5)
        c = _philox_round(_philox_round(c, key0, key1, 6), key0, key1, 7)
        c = _philox_round(_philox_round(c, key0, key1, 8), key0, key1, 9)
        word0[i], word1[i], word2[i], word3[i] = c


@njit(nogil=True, cache=True)
def _interleave_kernel(word0, word1, word2, word3, out):
    for i in range(word0.size):
        out[i, 0], out[i, 1], out[i, 2], out[i, 3] = word0[i], word1[i], word2[i], word3[i]


def draws(start, count, key):
    """uint32 [count]: the random numbers of positions start, start + 1, … of the stream `key` (64 bits).

    Philox4x32-10, the counter-based generator of Salmon et al. (SC 2011): position p is word p % 4 of the
    block with counter p // 4, so any part of the stream can be had without the rest. `start` % 4 is 0.
    """
    blocks = -(-count // 4)
    words, out = np.empty((4, blocks), np.uint32), np.empty((blocks, 4), np.uint32)
    _philox_kernel(np.uint64(start // 4), np.uint64(key & 0xFFFFFFFF), np.uint64(key >> 32), *words)
    _interleave_kernel(*words, out)
    return out.reshape(-1)[:count]


@njit(nogil=True, cache=True)
def _random_kernel(numbers, taken, limits, mask):
    for i in range(numbers.size):
        mask[i] = numbers[i] < limits[taken[i]]


@njit(nogil=True, cache=True)
def _plain_random_kernel(numbers, limit, mask):
    for i in range(numbers.size):
        mask[i] = numbers[i] < limit


def random_mask(start, count, key, taken, limits):
    """Keep position start + i where its draw is below limits[taken[i]] (of 2**32) -> mask uint8 [count]."""
    numbers, mask = draws(start, count, key), np.empty(count, np.uint8)
    if len(limits) == 1:
        _plain_random_kernel(numbers, np.uint64(limits[0]), mask)
    else:
        _random_kernel(numbers, taken, np.array(limits, np.uint64), mask)
    return mask
