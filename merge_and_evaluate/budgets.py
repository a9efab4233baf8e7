"""How many TIES keeps, and what `rescale` multiplies what is kept by, as mergekit 0.1.5 has it."""

from functools import cache

import numpy as np

from common.pruners.kernels.bits import array, bits_of_float32, float32_of_bits
from common.pruners.kernels.compiler import Step, in_steps, kernel, njit

_EXPONENTS = 256 + 32  # those of float32, and what sums of them reach
_UNITS = 126  # the exponent whose digits count 2**-24


def ties_budget(density: float, numel: int) -> int:
    """How many elements of a tensor `ties` keeps: max(1, ⌊density·numel⌋), all from 1 on, none up to 0.

    ties_budget(0.3, 10) -> 3; ties_budget(0.01, 10) -> 1
    """
    if density >= 1:
        return numel
    return max(1, int(density * numel)) if density > 0 and numel else 0


_CHUNK, _SPAN = 4096, 27  # 24 digits, moved left by up to 27, 4096 times: 63 bits


@njit(nogil=True, inline="always")
def _are_whole(words):
    """Whether all are multiples of 2**-24 and less than a quarter: as differences of float16 weights are, each."""
    lost, most = np.uint32(0), np.uint32(0)
    for i in range(words.size):
        magnitude = np.uint32(words[i] & np.uint32(0x7FFFFFFF))
        # What has been near 1 has lost its digits below 2**-24.
        rounded = np.float32(np.float32(float32_of_bits(magnitude) + np.float32(0.75)) - np.float32(0.75))
        lost = np.uint32(lost | np.uint32(bits_of_float32(rounded) ^ magnitude))
        most = max(most, magnitude)
    return lost == np.uint32(0) and most < np.uint32(0x3E800000)


_FEW = 256  # numbers below 2**22, whose sum 32 bits hold


@njit(nogil=True, inline="always")
def _sums_of_whole(words, mask):
    """(Σ |value|, Σ |kept value|) in units of 2**-24: in 32 bits twice as many are added at a time."""
    every, kept = np.int64(0), np.int64(0)
    for start in range(0, words.size, _FEW):
        few, their = words[start : start + _FEW], mask[start : start + _FEW]
        some, some_kept = np.uint32(0), np.uint32(0)
        for i in range(few.size):
            value = float32_of_bits(np.uint32(few[i] & np.uint32(0x7FFFFFFF)))
            # From a half to one the digits of a float32 count 2**-24.
            units = np.uint32(bits_of_float32(np.float32(value + np.float32(0.5))) - np.uint32(0x3F000000))
            some = np.uint32(some + units)
            some_kept = np.uint32(some_kept + np.uint32(units & np.uint32(np.uint32(0) - np.uint32(their[i]))))
        every += some
        kept += some_kept
    return every, kept


@njit(nogil=True, inline="always")
def _lowest(words):
    """The exponent that a chunk's digits can be added under in 64 bits, each exactly; 0 if it spans too many."""
    least, most = np.uint32(0xFFFFFFFF), np.uint32(0)
    for i in range(words.size):
        magnitude = np.uint32(words[i] & np.uint32(0x7FFFFFFF))
        most = max(most, magnitude)
        least = min(least, np.uint32(magnitude - np.uint32(1)))  # of zero that is the largest number there is
    lowest = max(np.int64(most >> np.uint32(23)) - _SPAN, 1)
    return lowest if np.int64(least) + 1 >= lowest << 23 else 0


@njit(nogil=True, inline="always")
def _sums_above(words, mask, lowest):
    """(Σ digits, Σ kept digits), as if all had the exponent `lowest`. Without branches: it vectorises."""
    every, kept = np.uint64(0), np.uint64(0)
    for i in range(words.size):
        magnitude = np.uint64(words[i] & np.uint32(0x7FFFFFFF))
        moved = max(magnitude >> np.uint64(23), lowest) - lowest
        digits = (magnitude & np.uint64(0x7FFFFF) | np.uint64(magnitude > np.uint64(0)) << np.uint64(23)) << moved
        every += digits
        kept += digits & (np.uint64(0) - np.uint64(mask[i]))
    return np.int64(every), np.int64(kept)


@cache
def _norm_kernel():
    @kernel()
    def add_norms(args, size):
        sums = array(args[0], 2 * _EXPONENTS, np.int64)  # two rows, one after the other
        delta, mask = array(args[1], size, np.uint32), array(args[2], size, np.uint8)
        for start in range(0, size, _CHUNK):
            words, kept = delta[start : start + _CHUNK], mask[start : start + _CHUNK]
            whole = _are_whole(words)
            lowest = np.int64(_UNITS) if whole else _lowest(words)
            if lowest:
                every = _sums_of_whole(words, kept) if whole else _sums_above(words, kept, np.uint64(lowest))
                for which, found in enumerate(every):
                    # In halves, the upper as digits of 32 exponents more: whole, the second chunk could overflow 64
                    # bits.
                    sums[which * _EXPONENTS + lowest] += found & 0xFFFFFFFF
                    sums[which * _EXPONENTS + lowest + 32] += found >> 32
                continue
            for i in range(words.size):
                exponent = (words[i] >> np.uint32(23)) & np.uint32(0xFF)
                digits = np.int64(words[i] & np.uint32(0x7FFFFF)) + (np.int64(1 << 23) if exponent else np.int64(0))
                sums[exponent] += digits
                sums[_EXPONENTS + exponent] += digits if kept[i] else np.int64(0)
        return 0

    return add_norms


def empty_norms() -> np.ndarray:
    """Where add_norms counts one model's tensor: int64 [2, exponents]."""
    return np.zeros((2, _EXPONENTS), np.int64)


@in_steps
def add_norms(sums: np.ndarray, delta: np.ndarray, mask: np.ndarray) -> list[Step]:
    """Add |delta| of a block to sums[0], and of what mask keeps to sums[1].

    delta: float32 bits, uint32 [elements], all finite, as kernels.subtract(model, …, base, …, delta, "F32") forms them.
    mask: uint8 [elements]. sums[i, e] counts 2**(max(e, 1) - 150). Exact: the digits of all values of an exponent are
    added as integers, so no order, block size or number of threads changes a bit of their sum, and parts counted apart
    may be added up. Good for 2**39 elements a tensor.
    """
    return [Step(_norm_kernel(), (delta, mask), (sums,))]


def rescale_factor(sums: np.ndarray) -> np.float32:
    """What mergekit's `rescale` multiplies kept values by: Σ|all| / Σ|kept| in float32, or 1 if one is below 1e-7."""
    before, after = (
        np.float32(sum(int(digits) << max(e, 1) for e, digits in enumerate(row)) * 2.0**-150) for row in sums
    )
    small = np.float32(1e-7)
    return np.float32(1) if before < small or after < small else before / after
