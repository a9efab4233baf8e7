"""Values: convert, subtract, add what a mask keeps, count.

Values are formed from bits where arithmetic is due: widened to float32 exactly, rounded back once, to nearest
even. All of it is in one file because numba's cache notices a change only in the file of the kernel itself, and every
kernel here is built on _value and _bits.
"""

from functools import cache

import numpy as np

from common.pruners.kernels.bits import array, bits_of_float32, float32_of_bits, float32_of_half, half_of_float32
from common.pruners.kernels.compiler import Step, in_steps, kernel, njit

F16, BF16, F32 = 0, 1, 2
_KIND = {"F16": F16, "BF16": BF16, "F32": F32}
_WORD = (np.uint16, np.uint16, np.uint32)  # by kind
BITS_DTYPE = {"F16": np.uint16, "BF16": np.uint16, "F32": np.uint32}
# All bits below the sign; the least bits that are not finite; by kind. As uint32, because numba widens Python's
# integers to 64 bits, which halves the lanes.
_MAGNITUDE = (np.uint32(0x7FFF), np.uint32(0x7FFF), np.uint32(0x7FFFFFFF))
_INFINITY = (np.uint32(0x7C00), np.uint32(0x7F80), np.uint32(0x7F800000))
_CHUNK = 4096  # elements; see "blocks and chunks"


# --- bits to values and back --------------------------------------------------------------------


@njit(nogil=True, inline="always")
def _value(bits, kind):
    """Bits -> float32, exactly."""
    if kind == F16:
        return float32_of_half(np.uint16(bits))
    if kind == BF16:
        return float32_of_bits(np.uint32(bits) << np.uint32(16))
    return float32_of_bits(np.uint32(bits))


@njit(nogil=True, inline="always")
def _bits(value, kind):
    """Float32 -> bits, rounded to nearest even; NaN stays NaN with any payload.

    To bfloat16: half a unit less one is added, and one where the last bit that stays is odd, so that a tie carries only
    into an odd number, which it makes even. In a NaN the addition could carry through to infinity or wrap to zero: it
    gets the highest bit of its payload instead.
    """
    if kind == F16:
        return np.uint32(half_of_float32(value))
    wide = bits_of_float32(value)
    if kind == BF16:
        rounded = wide + np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))
        is_nan = np.uint32(wide & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        return np.uint32(wide | np.uint32(0x400000) if is_nan else rounded) >> np.uint32(16)
    return wide


# --- blocks and chunks ----------------------------------------------------------------------------
# A caller passes a block. A kernel goes through it in chunks that stay in the first-level cache, and over each chunk
# several times: loops so simple that each vectorises.


@njit(nogil=True, inline="always")
def _largest(bits, kind):
    """The largest magnitude, as bits: at least _INFINITY[kind] if one value is not finite."""
    as_bits = bits.dtype.type
    below_sign, most = as_bits(_MAGNITUDE[kind]), as_bits(0)
    for i in range(bits.size):
        most = max(most, as_bits(bits[i] & below_sign))
    return np.uint32(most)


@njit(nogil=True, inline="always")
def _largest_and_nonzero(bits, kind):
    """(the largest magnitude, as bits; how many are not zero) in one pass, both as wide as an element: 4096 fit."""
    as_bits = bits.dtype.type
    below_sign, most, count = as_bits(_MAGNITUDE[kind]), as_bits(0), as_bits(0)
    for i in range(bits.size):
        magnitude = as_bits(bits[i] & below_sign)
        most = max(most, magnitude)
        count = as_bits(count + as_bits(magnitude != as_bits(0)))
    return np.uint32(most), np.int64(count)


@cache
def _all_finite_kernel(kind):
    word = _WORD[kind]

    @kernel()
    def all_finite(args, size):
        return _largest(array(args[0], size, word), kind) >= _INFINITY[kind]

    return all_finite


@in_steps
def all_finite(bits, dtype) -> list[Step]:
    """Whether there is no NaN and no infinity among values of `dtype`."""
    return [Step(_all_finite_kernel(_KIND[dtype]), (bits,))]


# --- convert and extract ------------------------------------------------------------------------


@njit(nogil=True, inline="always")
def _round_chunk(bits, source, out, target):
    for i in range(bits.size):
        out[i] = _bits(_value(bits[i], source), target)


@njit(nogil=True, inline="always")
def _changes_in_chunk(bits, source, out, target):
    """(how many values differ, how many of those became zero). Without branches, so that it vectorises."""
    changed, zeroed = np.uint32(0), np.uint32(0)
    for i in range(bits.size):
        value = _value(bits[i], source)
        changed = np.uint32(changed + np.uint32(_value(out[i], target) != value))
        zero = np.uint32(np.uint32(out[i] & _MAGNITUDE[target]) == np.uint32(0))
        zeroed = np.uint32(zeroed + np.uint32(zero & np.uint32(value != np.float32(0))))
    return changed, zeroed


@cache
def _convert_kernel(source, target):
    read, written = _WORD[source], _WORD[target]

    @kernel()
    def convert(args, size):
        # args: counts | bits, out
        counts, bits, out = array(args[0], 2, np.int64), array(args[1], size, read), array(args[2], size, written)
        most = np.uint32(0)
        for start in range(0, size, _CHUNK):
            part, result = bits[start : start + _CHUNK], out[start : start + _CHUNK]
            _round_chunk(part, source, result, target)
            changed, zeroed = _changes_in_chunk(part, source, result, target)
            counts[0] += changed
            counts[1] += zeroed
            most = max(most, _largest(result, target))
        return most >= _INFINITY[target]

    return convert


@in_steps
def convert(bits, source, out, target, counts=None) -> list[Step]:
    """out = values of dtype `source`, rounded to nearest even in dtype `target`; too large ones become infinite.

    Returns whether all of `out` is finite. To counts, int64 [2], is added how many values changed, and how many of
    those became zero.
    """
    counts = np.zeros(2, np.int64) if counts is None else counts
    return [Step(_convert_kernel(_KIND[source], _KIND[target]), (bits, out), (counts,))]


def clamp(bits, dtype) -> None:
    """In place: an infinity becomes the largest finite value of its sign, whose bits are one less."""
    kind, as_bits = _KIND[dtype], BITS_DTYPE[dtype]
    bits -= (bits & as_bits(_MAGNITUDE[kind])) == as_bits(_INFINITY[kind])


@njit(nogil=True, inline="always")
def _rounded(bits, kind, target):
    """Bits of `kind` -> float32, rounded to `target` first. LLVM would keep the two conversions that change nothing."""
    return _value(bits, kind) if kind == target else _value(_bits(_value(bits, kind), target), target)


@njit(nogil=True, inline="always")
def _subtract_chunk(left, left_kind, right, right_kind, out, kind):
    for i in range(left.size):
        out[i] = _bits(_rounded(left[i], left_kind, kind) - _rounded(right[i], right_kind, kind), kind)


@cache
def _subtract_kernel(left_kind, right_kind, kind):
    read, other, written = _WORD[left_kind], _WORD[right_kind], _WORD[kind]

    @kernel()
    def subtract(args, size):
        # args: differs | left, right, out
        differs, most = array(args[0], 1, np.int64), np.uint32(0)
        left, right, out = array(args[1], size, read), array(args[2], size, other), array(args[3], size, written)
        for start in range(0, size, _CHUNK):
            part = slice(start, start + _CHUNK)
            _subtract_chunk(left[part], left_kind, right[part], right_kind, out[part], kind)
            largest, nonzero = _largest_and_nonzero(out[part], kind)
            differs[0] += nonzero
            most = max(most, largest)
        return most >= _INFINITY[kind]

    return subtract


@in_steps
def subtract(left, left_dtype, right, right_dtype, out, dtype, differs=None) -> list[Step]:
    """out = left - right: both rounded to `dtype`, subtracted in float32, rounded once to `dtype`.

    Returns whether all of `out` is finite, and so the inputs. To differs, int64 [1], is added how many differences are
    not zero.
    """
    differs = np.zeros(1, np.int64) if differs is None else differs
    differing = _subtract_kernel(_KIND[left_dtype], _KIND[right_dtype], _KIND[dtype])
    return [Step(differing, (left, right, out), (differs,))]


# --- what the masks are applied to --------------------------------------------------------------


@njit(nogil=True, inline="always")
def _add_chunk(base, base_kind, vector, vector_kind, mask, scale, out):
    for i in range(base.size):
        # Both are computed and one is chosen: that vectorises, a branch on the mask does not.
        total = _bits(_value(base[i], base_kind) + _value(vector[i], vector_kind) * scale, base_kind)
        out[i] = np.uint32(total) if mask[i] else np.uint32(base[i])


@cache
def _add_kernel(base_kind, vector_kind):
    word, other = _WORD[base_kind], _WORD[vector_kind]

    @kernel()
    def add(args, size):
        # args: scale | out, base, vector, mask
        scale, most = array(args[0], 1, np.float32)[0], np.uint32(0)
        out, base, vector = array(args[1], size, word), array(args[2], size, word), array(args[3], size, other)
        mask = array(args[4], size, np.uint8)
        for start in range(0, size, _CHUNK):
            part = slice(start, start + _CHUNK)
            _add_chunk(base[part], base_kind, vector[part], vector_kind, mask[part], scale, out[part])
            most = max(most, _largest(out[part], base_kind))
        return most >= _INFINITY[base_kind]

    return add


@in_steps
def add_kept(out, base, base_dtype, vector, vector_dtype, mask, scale) -> list[Step]:
    """out = round(base + scale * vector) where mask keeps, in float32, rounded once; elsewhere base's own bits.

    Returns whether all of it is finite, and so all of base.
    """
    adding = _add_kernel(_KIND[base_dtype], _KIND[vector_dtype])
    return [Step(adding, (out, base, vector, mask), (np.array([scale], np.float32),))]


@njit(nogil=True, inline="always")
def _keep_chunk(vector, kind, mask, scale, out):
    for i in range(vector.size):
        scaled = _bits(_value(vector[i], kind) * scale, kind)
        out[i] = np.uint32(scaled) if mask[i] else np.uint32(0)


@cache
def _keep_kernel(kind):
    word = _WORD[kind]

    @kernel()
    def keep(args, size):
        # args: scale | out, vector, mask
        scale, most = array(args[0], 1, np.float32)[0], np.uint32(0)
        out, vector, mask = array(args[1], size, word), array(args[2], size, word), array(args[3], size, np.uint8)
        for start in range(0, size, _CHUNK):
            part = slice(start, start + _CHUNK)
            _keep_chunk(vector[part], kind, mask[part], scale, out[part])
            most = max(most, _largest(out[part], kind))
        return most >= _INFINITY[kind]

    return keep


@in_steps
def keep_vector(out, vector, dtype, mask, scale) -> list[Step]:
    """out = round(scale * vector) where mask keeps, +0.0 elsewhere -> whether all of it is finite."""
    return [Step(_keep_kernel(_KIND[dtype]), (out, vector, mask), (np.array([scale], np.float32),))]


# --- what the report measures -------------------------------------------------------------------


# Sums may be regrouped, which is what lets them vectorise; the report rounds to what does not depend on it.
_REGROUP = {"reassoc", "contract"}


@njit(nogil=True, inline="always")
def _chunk_energy(vector, mask, kind, as_sum):
    kept, every = as_sum(0), as_sum(0)
    for i in range(vector.size):
        value = as_sum(_value(vector[i], kind))
        square = value * value
        kept += square if mask[i] else as_sum(0)
        every += square
    return kept, every


@njit(nogil=True, inline="always")
def _count_both(left, right):
    """In 16 bits, which a chunk's 4096 fit: in 32 half as many are added at a time."""
    both = np.uint16(0)
    for i in range(left.size):
        both = np.uint16(both + np.uint16(left[i] & right[i]))
    return np.int64(both)


@njit(nogil=True, inline="always")
def _tally_groups(mask, at, m, counts):
    """Count what is kept in each whole group of m; `at` is where `mask` begins in its tensor.

    A group may begin in an earlier block: `tail` is what the open one holds so far.
    """
    position = 0
    while position < mask.size:
        end = min(mask.size, position + m - (at + position) % m)
        group, kept = mask[position:end], np.uint16(0)  # as in _count_both
        for i in range(group.size):
            kept = np.uint16(kept + np.uint16(group[i]))
        counts.kept += kept
        counts.tail += kept
        position = end
        if (at + position) % m == 0:
            counts.groups += 1
            counts.squares += counts.tail * counts.tail
            counts.tail = 0


@cache
def _tally_kernel(kind, fields):
    # Squares of float16 values stay far from float32's limits; each chunk's sums are added to a float64.
    as_sum, word = np.float32 if kind == F16 else np.float64, _WORD[kind]

    @kernel(fastmath=_REGROUP)
    def tally(args, size):
        j, m, counts = args[0], args[1], array(args[2], 1, fields)[0]
        at, vector, most = args[3], array(args[4], size, word), np.uint32(0)
        for start in range(0, size, _CHUNK):
            part = vector[start : start + _CHUNK]
            mask = array(args[5 + j] + start, part.size, np.uint8)
            kept, every = _chunk_energy(part, mask, kind, as_sum)
            counts.energy_kept += kept
            counts.energy += every
            for i in range(j):
                counts.both[i] += _count_both(array(args[5 + i] + start, part.size, np.uint8), mask)
            _tally_groups(mask, at + start, m, counts)
            largest, nonzero = _largest_and_nonzero(part, kind)
            counts.nonzero += nonzero
            most = max(most, largest)
        return most >= _INFINITY[kind]

    return tally


@in_steps
def tally(vector, dtype, masks, j, at, m, counts) -> list[Step]:
    """Add one block of vector number j and its mask to counts[j] -> whether all of the vector is finite.

    masks: of every vector, uint8 [elements]. The block begins at element `at` of its tensor.
    counts: structured array [vectors] (see common.pruners.tally); of `both` only the pairs i < j are filled.
    """
    counted = _tally_kernel(_KIND[dtype], counts.dtype)
    return [Step(counted, (at, vector, *masks[: j + 1]), (j, m, counts[j : j + 1]))]
