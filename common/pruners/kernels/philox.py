"""Random masks by position, from Philox4x32-10, the counter-based generator of Salmon et al. (SC 2011).

Position p of the stream of a key is word p % 4 of the block with counter p // 4, so any part of the stream can be had
without the rest: no shard layout, block size or number of processes changes a draw.
"""

from functools import cache

import numpy as np

from common.pruners.kernels.bits import LANES, array, which_exceed
from common.pruners.kernels.compiler import Step, in_steps, kernel, njit

_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


@njit(nogil=True, inline="always")
def _philox_round(c, key0, key1, step):
    """Round number `step` of ten, on 32-bit words held in 64 bits, where the product of two of them fits.

    What is above the 32 bits is left there and means nothing: the multiplication takes the lower halves alone, so only
    that is written down here, and costs no instruction.
    """
    k0 = (key0 + np.uint64(step) * np.uint64(0x9E3779B9)) & _LOW
    k1 = (key1 + np.uint64(step) * np.uint64(0xBB67AE85)) & _LOW
    a, b = (c[0] & _LOW) * np.uint64(0xD2511F53), (c[2] & _LOW) * np.uint64(0xCD9E8D57)
    return (b >> _HALF) ^ c[1] ^ k0, b, (a >> _HALF) ^ c[3] ^ k1, a


_COUNTERS = 1024  # at a time: their four words, 16 kB, stay in the first-level cache


@njit(nogil=True, inline="always")
def _philox(first, key0, key1, word0, word1, word2, word3):
    """The four words of the counters from `first` on. Each kind of word has an array of its own: stores vectorise."""
    for i in range(word0.size):
        counter = np.uint64(first + np.uint64(i))
        c = counter, counter >> _HALF, np.uint64(0), np.uint64(0)
        # Written out: with a loop over the ten rounds inside, the loop over i does not vectorise.
        c = _philox_round(_philox_round(c, key0, key1, 0), key0, key1, 1)
        c = _philox_round(_philox_round(c, key0, key1, 2), key0, key1, 3)
        c = _philox_round(_philox_round(c, key0, key1, 4), key0, key1, 5)
        c = _philox_round(_philox_round(c, key0, key1, 6), key0, key1, 7)
        c = _philox_round(_philox_round(c, key0, key1, 8), key0, key1, 9)
        word0[i], word1[i], word2[i], word3[i] = c


@njit(nogil=True, inline="always")
def _below(word0, word1, word2, word3, last, out):
    """Whether each draw is at most `last`: a byte each, those of a counter in one word of `out`, in order in memory.

    The lowest byte of a word comes first in memory: on little-endian machines, which safetensors files are for, too.
    """
    byte = np.uint32(8)
    for i in range(out.size):
        late = np.uint32(word3[i] <= last) << byte | np.uint32(word2[i] <= last)
        out[i] = (late << byte | np.uint32(word1[i] <= last)) << byte | np.uint32(word0[i] <= last)


@njit(nogil=True, inline="always")
def _take(mask, below, some, taken, level, is_one_of_several):
    """mask = below; of several limits each call fills its own level's positions, from 0 on (`taken` says which)."""
    if not is_one_of_several:
        for i in range(mask.size):
            mask[i] = below[i] & some
    else:
        keep_others = np.uint8(level > 0)
        for i in range(mask.size):
            applies = np.uint8(taken[i] == level)
            mask[i] = (mask[i] & keep_others) | (below[i] & some & applies)


@cache
def _random_kernel(is_one_of_several):
    @kernel()
    def keep(args, size):
        # args: key0, key1, last, some, limits | start, mask, taken
        key0, key1, first = np.uint64(args[0]), np.uint64(args[1]), np.uint64(args[5] // 4)
        limits = args[4] if is_one_of_several else 1
        last, some = array(args[2], limits, np.uint32), array(args[3], limits, np.uint8)
        mask, taken = array(args[6], size, np.uint8), array(args[7], size, np.uint8)
        word0, word1, word2, word3 = np.empty((4, _COUNTERS), np.uint32)
        packed = np.empty(_COUNTERS, np.uint32)
        below = packed.view(np.uint8)
        for start in range(0, size, 4 * _COUNTERS):
            part, earlier = mask[start : start + 4 * _COUNTERS], taken[start : start + 4 * _COUNTERS]
            _philox(np.uint64(first + np.uint64(start // 4)), key0, key1, word0, word1, word2, word3)
            for level in range(limits):
                _below(word0, word1, word2, word3, last[level], packed)
                _take(part, below, some[level], earlier, np.uint8(level), is_one_of_several)
        return 0

    return keep


@in_steps
def random_mask(mask, start, key, taken, limits) -> list[Step]:
    """mask[i], uint8 = whether the draw of position start + i is below limits[taken[i]] (of 2**32).

    With one limit `taken` is not read; else it counts earlier *draws*, so that masks depend on no value. Zeros are
    left out of the masks afterwards, by drop_zeros. `start` % 4 is 0.
    """
    # The limits 0 to 2**32 are one more than a word has: "at most last", and a switch for the limit 0.
    last = np.array([max(limit, 1) - 1 for limit in limits], np.uint32)
    some = np.array([limit > 0 for limit in limits], np.uint8)
    taken = taken if len(limits) > 1 else mask
    numbers = (key & 0xFFFFFFFF, key >> 32, last, some, len(limits))
    return [Step(_random_kernel(len(limits) > 1), (start, mask, taken), numbers)]


# --- masks kept for another pass ------------------------------------------------------------------
# A bit an element: unpacking takes a tenth of the time of drawing again.


@cache
def _pack_kernel():
    @kernel()
    def pack(args, size):
        words, mask = array(args[0] + args[1] // 8, -(-size // LANES), np.uint32), array(args[2], size, np.uint8)
        for i in range(size // LANES):
            words[i] = which_exceed(mask, i * LANES, np.uint8(0))
        if size % LANES:
            last = size // LANES
            words[last] = 0
            for i in range(last * LANES, size):
                words[last] |= np.uint32(mask[i]) << np.uint32(i % LANES)
        return 0

    return pack


@in_steps
def pack_mask(words, start, mask) -> list[Step]:
    """Keep the mask of the elements from `start` on, a multiple of 32, in words: uint32, a bit for each of a tensor."""
    return [Step(_pack_kernel(), (start, mask), (words,))]


@cache
def _unpack_kernel():
    @kernel()
    def unpack(args, size):
        eights, mask = array(args[0] + args[1] // 8, -(-size // 8), np.uint8), array(args[2], size, np.uint8)
        spread = array(args[2], size // 8, np.uint64)
        for i in range(size // 8):
            # Seven bits are multiplied to where they belong without meeting; the eighth is brought there by itself.
            bits = np.uint64(eights[i])
            seven = (bits & np.uint64(0x7F)) * np.uint64(0x02040810204081) & np.uint64(0x0101010101010101)
            spread[i] = seven | (bits >> np.uint64(7)) << np.uint64(56)
        for i in range(size // 8 * 8, size):
            mask[i] = (eights[i // 8] >> np.uint8(i % 8)) & np.uint8(1)
        return 0

    return unpack


@in_steps
def unpack_mask(words, start, mask) -> list[Step]:
    """mask, uint8 = what pack_mask() kept of the elements from `start` on."""
    return [Step(_unpack_kernel(), (start, mask), (words,))]
