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
_KIND = {"F16": F16, "BF16": BF16, "F32": F32}
BITS_DTYPE = {"F16": np.uint16, "BF16": np.uint16, "F32": np.uint32}
# All bits below the sign; the least bits that are not finite. As uint32, because numba widens Python's
# integers to 64 bits, which halves the lanes.
_MAGNITUDE = {F16: np.uint32(0x7FFF), BF16: np.uint32(0x7FFF), F32: np.uint32(0x7FFFFFFF)}
_INFINITY = {F16: np.uint32(0x7C00), BF16: np.uint32(0x7F80), F32: np.uint32(0x7F800000)}
_CHUNK = 4096  # elements counted in 32 bits (as wide as a float32 lane) before a 64-bit sum takes over


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


@njit(nogil=True, inline="always")
def _convert_chunk(bits, out, source, target, clamp, limits):
    magnitude_in, infinity_in, magnitude_out, infinity_out = limits
    changed, zeroed, not_finite, overflow = np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0)
    for i in range(bits.size):
        value = _value(bits[i], source)
        new = _bits(value, target)
        over = np.uint32(np.uint32(new & magnitude_out) >= infinity_out)
        if clamp and over:
            new = np.uint32(new - np.uint32(new & magnitude_out) + infinity_out - np.uint32(1))
        out[i] = new
        zero = np.uint32(np.uint32(new & magnitude_out) == np.uint32(0))
        changed = np.uint32(changed + np.uint32(_value(new, target) != value))
        zeroed = np.uint32(zeroed + np.uint32(zero & np.uint32(value != np.float32(0))))
        overflow = np.uint32(overflow | over)
        not_finite = np.uint32(not_finite | np.uint32(np.uint32(bits[i] & magnitude_in) >= infinity_in))
    return changed, zeroed, not_finite, overflow


@cache
def _convert_kernel(source, target, clamp):
    limits = (_MAGNITUDE[source], _INFINITY[source], _MAGNITUDE[target], _INFINITY[target])

    @njit(nogil=True, cache=True)
    def convert(bits, out):
        changed = zeroed = not_finite = overflow = 0
        for start in range(0, bits.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            c, z, n, o = _convert_chunk(bits[part], out[part], source, target, clamp, limits)
            changed, zeroed, not_finite, overflow = changed + c, zeroed + z, not_finite | n, overflow | o
        return changed, zeroed, not_finite != 0, overflow != 0

    return convert


def convert(bits, source, target, clamp):
    """Round `bits` of dtype `source` to dtype `target`, to nearest even -> (bits, counts).

    counts: (values changed, non-zero values that became zero, input had NaN or infinity, a finite value
    became infinite). With `clamp` such a value becomes the largest finite one of its sign instead.
    """
    out = np.empty(bits.size, BITS_DTYPE[target])
    return out, _convert_kernel(_KIND[source], _KIND[target], clamp)(bits, out)


@cache
def _subtract_kernel(left, right, target):
    magnitude_left, infinity_left = _MAGNITUDE[left], _INFINITY[left]
    magnitude_right, infinity_right = _MAGNITUDE[right], _INFINITY[right]
    magnitude_out, infinity_out = _MAGNITUDE[target], _INFINITY[target]

    @njit(nogil=True, cache=True)
    def subtract(finetuned, base, out):
        bad_left = bad_right = overflow = np.uint32(0)
        for i in range(base.size):
            a = _bits(_value(finetuned[i], left), target)
            b = _bits(_value(base[i], right), target)
            new = _bits(_value(a, target) - _value(b, target), target)
            out[i] = new
            bad_left = np.uint32(bad_left | np.uint32((finetuned[i] & magnitude_left) >= infinity_left))
            bad_right = np.uint32(bad_right | np.uint32((base[i] & magnitude_right) >= infinity_right))
            overflow = np.uint32(overflow | np.uint32((new & magnitude_out) >= infinity_out))
        return bad_left != 0, bad_right != 0, overflow != 0

    return subtract


def subtract(finetuned, finetuned_dtype, base, base_dtype, target):
    """finetuned - base -> (bits, flags): both rounded to dtype `target`, subtracted in float32, rounded once.

    flags: (finetuned had NaN or infinity, base had, the result or a rounded input overflowed).
    """
    kernel = _subtract_kernel(_KIND[finetuned_dtype], _KIND[base_dtype], _KIND[target])
    out = np.empty(base.size, BITS_DTYPE[target])
    return out, kernel(finetuned, base, out)


# --- what the masks are applied to --------------------------------------------------------------


@cache
def _add_kernel(base_kind, vector_kind):
    base_magnitude, base_infinity = _MAGNITUDE[base_kind], _INFINITY[base_kind]
    vector_magnitude, vector_infinity = _MAGNITUDE[vector_kind], _INFINITY[vector_kind]

    @njit(nogil=True, cache=True)
    def add(base, vector, mask, scale, out):
        bad_base = bad_vector = overflow = np.uint32(0)
        for i in range(base.size):
            total = _bits(_value(base[i], base_kind) + _value(vector[i], vector_kind) * scale, base_kind)
            new = np.uint32(total) if mask[i] else np.uint32(base[i])
            out[i] = new
            bad_base = np.uint32(bad_base | np.uint32(np.uint32(base[i] & base_magnitude) >= base_infinity))
            bad_vector = np.uint32(
                bad_vector | np.uint32(np.uint32(vector[i] & vector_magnitude) >= vector_infinity)
            )
            overflow = np.uint32(overflow | np.uint32(np.uint32(new & base_magnitude) >= base_infinity))
        return bad_base != 0, bad_vector != 0, overflow != 0

    return add


def add_kept(base, base_dtype, vector, vector_dtype, mask, scale):
    """round(base + scale * vector) where mask keeps, in float32, rounded once; elsewhere base's own bits -> (bits, flags).

    flags: (base had NaN or infinity, vector had, a sum overflowed base's dtype).
    """
    out = np.empty_like(base)
    return out, _add_kernel(_KIND[base_dtype], _KIND[vector_dtype])(
        base, vector, mask, np.float32(scale), out
    )


@cache
def _keep_kernel(kind):
    magnitude, infinity = _MAGNITUDE[kind], _INFINITY[kind]

    @njit(nogil=True, cache=True)
    def keep(vector, mask, scale, out):
        bad, overflow = np.uint32(0), np.uint32(0)
        for i in range(vector.size):
            scaled = _bits(_value(vector[i], kind) * scale, kind)
            new = np.uint32(scaled) if mask[i] else np.uint32(0)
            out[i] = new
            bad = np.uint32(bad | np.uint32(np.uint32(vector[i] & magnitude) >= infinity))
            overflow = np.uint32(overflow | np.uint32(np.uint32(new & magnitude) >= infinity))
        return bad != 0, overflow != 0

    return keep


def keep_vector(vector, dtype, mask, scale):
    """round(scale * vector) where mask keeps, +0.0 elsewhere -> (bits, (had NaN or infinity, overflowed))."""
    out = np.empty_like(vector)
    return out, _keep_kernel(_KIND[dtype])(vector, mask, np.float32(scale), out)


@cache
def _energy_kernel(kind):
    # Sums may be regrouped (that is what lets them vectorise); the report rounds to what does not depend on it.
    @njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
    def energy(vector, mask):
        kept = dropped = np.float64(0.0)
        for i in range(vector.size):
            value = np.float64(_value(vector[i], kind))
            square = value * value
            kept += square if mask[i] else 0.0
            dropped += 0.0 if mask[i] else square
        return kept, dropped

    return energy


def energy(vector, dtype, mask):
    """(sum of squares kept, sum of squares dropped), float64."""
    return _energy_kernel(_KIND[dtype])(vector, mask)
