"""Values: convert, subtract, add what a mask keeps, sum squares.

Values are formed from bits where arithmetic is due: widened to float32 exactly, rounded back once, to nearest
even.
"""

from functools import cache

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

F16, BF16, F32 = 0, 1, 2
_NAME = ("F16", "BF16", "F32")
_KIND = {"F16": F16, "BF16": BF16, "F32": F32}
BITS_DTYPE = {"F16": np.uint16, "BF16": np.uint16, "F32": np.uint32}
# All bits below the sign; the least bits that are not finite. As uint32, because numba widens Python's
# integers to 64 bits, which halves the lanes.
_MAGNITUDE = {F16: np.uint32(0x7FFF), BF16: np.uint32(0x7FFF), F32: np.uint32(0x7FFFFFFF)}
_INFINITY = {F16: np.uint32(0x7C00), BF16: np.uint32(0x7F80), F32: np.uint32(0x7F800000)}
_CHUNK = 4096  # elements summed in float32 before a float64 sum takes over


# --- bits to values and back --------------------------------------------------------------------


@intrinsic
def _float32_of_half(context, bits):
    def codegen(_, builder, __, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def _half_of_float32(context, value):
    def codegen(_, builder, __, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


@intrinsic
def _float32_of_bits(context, bits):
    def codegen(_, builder, __, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def _bits_of_float32(context, value):
    def codegen(_, builder, __, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@njit(nogil=True, inline="always")
def _value(bits, kind):
    """Bits -> float32, exactly."""
    if kind == F16:
        return _float32_of_half(np.uint16(bits))
    if kind == BF16:
        return _float32_of_bits(np.uint32(bits) << np.uint32(16))
    return _float32_of_bits(np.uint32(bits))


@njit(nogil=True, inline="always")
def _bits(value, kind):
    """Float32 -> bits, rounded to nearest even (NaN is refused before its payload matters)."""
    if kind == F16:
        return np.uint32(_half_of_float32(value))
    wide = _bits_of_float32(value)
    if kind == BF16:
        return (wide + np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return wide


# --- convert and extract ------------------------------------------------------------------------


@cache
def _largest_kernel(kind):
    as_bits = BITS_DTYPE[_NAME[kind]]
    magnitude = as_bits(_MAGNITUDE[kind])

    @njit(nogil=True, cache=True)
    def largest(bits):
        most = as_bits(0)
        for i in range(bits.size):
            most = max(most, as_bits(bits[i] & magnitude))
        return most

    return largest


def all_finite(bits, dtype) -> bool:
    """Whether there is no NaN and no infinity among values of `dtype`."""
    kind = _KIND[dtype]
    return bool(_largest_kernel(kind)(bits) < _INFINITY[kind])


@cache
def _round_kernel(source, target):
    @njit(nogil=True, cache=True)
    def round_bits(bits, out):
        for i in range(bits.size):
            out[i] = _bits(_value(bits[i], source), target)

    return round_bits


def round_into(out, target, bits, source):
    """out = values of dtype `source`, rounded to nearest even in dtype `target`; too large ones become infinite."""
    if source == target:
        out[:] = bits
    else:
        _round_kernel(_KIND[source], _KIND[target])(bits, out)


def rounded(bits, source, target):
    """What round_into gives, in an array of its own; the array itself where there is nothing to round."""
    if source == target:
        return bits
    out = np.empty(bits.size, BITS_DTYPE[target])
    round_into(out, target, bits, source)
    return out


def clamp(bits, dtype):
    """In place: an infinity becomes the largest finite value of its sign."""
    kind, as_bits = _KIND[dtype], BITS_DTYPE[dtype]
    bits -= (bits & as_bits(_MAGNITUDE[kind])) == as_bits(_INFINITY[kind])


@cache
def _changes_kernel(source, target):
    magnitude = _MAGNITUDE[target]

    @njit(nogil=True, cache=True)
    def changes(bits, out):
        changed, zeroed = np.uint32(0), np.uint32(0)
        for i in range(bits.size):
            value = _value(bits[i], source)
            changed = np.uint32(changed + np.uint32(_value(out[i], target) != value))
            zero = np.uint32(np.uint32(out[i] & magnitude) == np.uint32(0))
            zeroed = np.uint32(zeroed + np.uint32(zero & np.uint32(value != np.float32(0))))
        return changed, zeroed

    return changes


def changes(bits, source, out, target):
    """(values that rounding changed, non-zero ones it made zero), for fewer than 2**32 elements."""
    return (0, 0) if source == target else _changes_kernel(_KIND[source], _KIND[target])(bits, out)


@cache
def _subtract_kernel(kind):
    magnitude = _MAGNITUDE[kind]

    @njit(nogil=True, cache=True)
    def subtract(left, right, out):
        differs = np.uint32(0)
        for i in range(left.size):
            bits = _bits(_value(left[i], kind) - _value(right[i], kind), kind)
            out[i] = bits
            differs = np.uint32(differs + np.uint32(np.uint32(bits & magnitude) != np.uint32(0)))
        return differs

    return subtract


def subtract(left, right, out, dtype):
    """out = left - right, in float32, rounded once to `dtype`, which all three have -> how many are not zero."""
    return _subtract_kernel(_KIND[dtype])(left, right, out)


# --- what the masks are applied to --------------------------------------------------------------


@cache
def _add_kernel(base_kind, vector_kind):
    @njit(nogil=True, cache=True)
    def add(base, vector, mask, scale, out):
        for i in range(base.size):
            total = _bits(_value(base[i], base_kind) + _value(vector[i], vector_kind) * scale, base_kind)
            out[i] = np.uint32(total) if mask[i] else np.uint32(base[i])

    return add


def add_kept(out, base, base_dtype, vector, vector_dtype, mask, scale) -> bool:
    """out = round(base + scale * vector) where mask keeps, in float32, rounded once; elsewhere base's own bits.

    Returns whether all of it is finite.
    """
    _add_kernel(_KIND[base_dtype], _KIND[vector_dtype])(base, vector, mask, np.float32(scale), out)
    return all_finite(out, base_dtype)


@cache
def _keep_kernel(kind):
    @njit(nogil=True, cache=True)
    def keep(vector, mask, scale, out):
        for i in range(vector.size):
            scaled = _bits(_value(vector[i], kind) * scale, kind)
            out[i] = np.uint32(scaled) if mask[i] else np.uint32(0)

    return keep


def keep_vector(out, vector, dtype, mask, scale) -> bool:
    """out = round(scale * vector) where mask keeps, +0.0 elsewhere -> whether all of it is finite."""
    _keep_kernel(_KIND[dtype])(vector, mask, np.float32(scale), out)
    return all_finite(out, dtype)


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


@cache
def _energy_kernel(kind):
    as_sum = (
        np.float32 if kind == F16 else np.float64
    )  # squares of float16 values stay far from float32's limits

    @njit(nogil=True, cache=True, fastmath=_REGROUP)
    def energy(vector, mask):
        kept = every = 0.0
        for start in range(0, vector.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            k, e = _chunk_energy(vector[part], mask[part], kind, as_sum)
            kept, every = kept + k, every + e
        return kept, every

    return energy


def energy(vector, dtype, mask):
    """(sum of squares of what is kept, sum of all squares), float64, good to about 6 digits."""
    return _energy_kernel(_KIND[dtype])(vector, mask)
