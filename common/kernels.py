"""The arithmetic, compiled: numba kernels over the bit patterns of flat arrays.

Arrays hold bits: uint16 for float16 ("F16") and bfloat16 ("BF16"), uint32 for float32 ("F32"). The order
of magnitudes is the order of the bits below the sign, so ranking compares integers and never rounds.
Values are only formed where arithmetic is due: widened to float32 exactly, and rounded back once, to
nearest even.

Each kernel is built for its dtypes (and nm for its m) by a function that numba caches on disk, so the
branches on them cost nothing and are compiled once per machine. All run without the GIL. The same
functions in torch: torch_kernels.py.
"""

from functools import cache

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

F16, BF16, F32 = 0, 1, 2
_KIND = {"F16": F16, "BF16": BF16, "F32": F32}
BITS_DTYPE = {"F16": np.uint16, "BF16": np.uint16, "F32": np.uint32}
MAGNITUDE_BITS = {"F16": 15, "BF16": 15, "F32": 31}
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


def convert(bits, source, target, clamp, out):
    """Round `bits` of dtype `source` to dtype `target`, to nearest even, into `out`.

    Returns (values changed, non-zero values that became zero, input had NaN or infinity, a finite value
    became infinite). With `clamp` such a value becomes the largest finite one of its sign instead.
    """
    return _convert_kernel(_KIND[source], _KIND[target], clamp)(bits, out)


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


def subtract(finetuned, finetuned_dtype, base, base_dtype, target, out):
    """finetuned - base into `out`: both rounded to dtype `target`, subtracted in float32, rounded once.

    Returns (finetuned had NaN or infinity, base had, the result or a rounded input overflowed).
    """
    kernel = _subtract_kernel(_KIND[finetuned_dtype], _KIND[base_dtype], _KIND[target])
    return kernel(finetuned, base, out)


# --- ranking: keep the n largest of every m -------------------------------------------------------


@njit(nogil=True, inline="always")
def _keep_largest(keys, size, k, key_bits, mask):
    """mask[:size] = the k largest of keys[:size], 1 where kept; among equal keys the first.

    Finds the k-th largest key bit by bit from the top: the largest threshold that at least k keys reach.
    Leaves as soon as exactly k do. The counter is as wide as a key, so that the loop vectorises.
    """
    as_key = keys.dtype.type
    threshold, reached = as_key(0), size
    for bit in range(key_bits - 1, -1, -1):
        candidate = as_key(threshold | as_key(as_key(1) << as_key(bit)))
        count = as_key(0)
        for i in range(size):
            count = as_key(count + as_key(keys[i] >= candidate))
        if count >= k:
            threshold, reached = candidate, np.int64(count)
            if count == k:
                break
    for i in range(size):
        mask[i] = keys[i] >= threshold
    last = size
    for _ in range(reached - k):  # of those that tie at the threshold the last are too many
        last -= 1
        while keys[last] != threshold:
            last -= 1
        mask[last] = 0


@njit(nogil=True, inline="always")
def _key(bits, taken, magnitude, as_key, magnitude_bits, levels):
    """What ranks a position: first fewest earlier vectors that kept it, then larger magnitude."""
    key = as_key(bits & magnitude)
    if levels:
        key = as_key(key | as_key(as_key(levels - taken) << as_key(magnitude_bits)))
    return key


@cache
def _nm_kernel(magnitude, key_dtype, magnitude_bits, levels, m):
    """Runs one after the other: for m so large that counting within a run vectorises."""
    as_key = np.dtype(key_dtype).type
    key_bits = magnitude_bits + levels.bit_length()

    @njit(nogil=True, cache=True)
    def nm(bits, taken, n, mask):
        keys = np.empty(m, as_key)
        full = bits.size // m * m
        for start in range(0, full, m):
            run, earlier, kept = bits[start : start + m], taken[start : start + m], mask[start : start + m]
            for i in range(m):
                keys[i] = _key(run[i], earlier[i], magnitude, as_key, magnitude_bits, levels)
            _keep_largest(keys, m, n, key_bits, kept)
        run, earlier, kept = bits[full:], taken[full:], mask[full:]
        for i in range(run.size):
            keys[i] = _key(run[i], earlier[i], magnitude, as_key, magnitude_bits, levels)
        _keep_largest(keys, run.size, (n * run.size + m - 1) // m, key_bits, kept)

    return nm


_SIDE_BY_SIDE = 128  # runs ranked together when m is small


@njit(nogil=True, inline="always")
def _keep_largest_of_each(keys, k, key_bits, thresholds, counts, mask):
    """The same rule for the columns of keys [m, runs] side by side: the lanes are runs, not positions."""
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
def _small_nm_kernel(magnitude, key_dtype, magnitude_bits, levels, m):
    as_key = np.dtype(key_dtype).type
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


def nm_mask(bits, dtype, taken, levels, n, m, mask):
    """Keep n of every m consecutive elements, into `mask` (uint8, 1 = keep); a last run of r keeps ceil(n*r/m).

    `taken[i]` (uint8) counts the `levels` earlier vectors that kept position i; with levels 0 it is not read.
    Order within a run: fewest earlier vectors, larger magnitude, lower index.
    Source: CABS, section 3 (n:m balanced sparsification). `bits` starts at a multiple of m.
    """
    kind = _KIND[dtype]
    rule = (_MAGNITUDE[kind], _key_dtype(dtype, levels), MAGNITUDE_BITS[dtype], levels, m)
    if levels == 0:
        taken = mask  # any array of the right length: the compiled kernel does not read it
    done = 0
    if m <= _SMALL_M:
        done = bits.size // (m * _SIDE_BY_SIDE) * (m * _SIDE_BY_SIDE)
        _small_nm_kernel(*rule)(bits[:done], taken[:done], n, mask[:done])
    if done < bits.size:
        _nm_kernel(*rule)(bits[done:], taken[done:], n, mask[done:])


# --- ranking in scopes larger than a block: count digits, then compare with a threshold -----------


@cache
def _count_kernel(magnitude, magnitude_bits, levels, shift, width):
    digit_of = np.uint64((1 << width) - 1)
    shift, above = np.uint64(shift), np.uint64(shift + width)

    @njit(nogil=True, cache=True)
    def count(bits, taken, prefix, counts):
        for i in range(bits.size):
            key = _key(bits[i], taken[i], magnitude, np.uint64, magnitude_bits, levels)
            if key >> above == prefix:
                counts[i & 1, (key >> shift) & digit_of] += np.uint32(1)

    return count


def count_digits(bits, dtype, taken, levels, shift, width, prefix):
    """How many keys with the leading digits `prefix` have each value of the next digit -> int64 [2**width].

    The digit is `width` bits of the key above its `shift` lowest. For the key see nm_mask.
    """
    kernel = _count_kernel(_MAGNITUDE[_KIND[dtype]], MAGNITUDE_BITS[dtype], levels, shift, width)
    counts = np.zeros((2, 1 << width), np.uint32)  # two banks: runs of equal keys would wait for each other
    kernel(bits, taken if levels else bits, np.uint64(prefix), counts)
    return counts.sum(axis=0, dtype=np.int64)


@cache
def _threshold_kernel(magnitude, key_dtype, magnitude_bits, levels):
    as_key = np.dtype(key_dtype).type

    @njit(nogil=True, cache=True)
    def threshold(bits, taken, least, ties, mask):
        tied = 0
        for i in range(bits.size):
            key = _key(bits[i], taken[i], magnitude, as_key, magnitude_bits, levels)
            mask[i] = key >= least
            tied += key == least
        if tied <= ties:
            return tied
        left = ties
        for i in range(bits.size):
            if _key(bits[i], taken[i], magnitude, as_key, magnitude_bits, levels) == least:
                mask[i] = left > 0
                left -= left > 0
        return ties

    return threshold


def threshold_mask(bits, dtype, taken, levels, least, ties, mask):
    """Keep keys above `least` and the first `ties` that equal it, into `mask`; returns how many ties it used."""
    key_dtype = _key_dtype(dtype, levels)
    kernel = _threshold_kernel(_MAGNITUDE[_KIND[dtype]], key_dtype, MAGNITUDE_BITS[dtype], levels)
    return kernel(bits, taken if levels else mask, np.dtype(key_dtype).type(least), ties, mask)


# --- random: Philox4x32-10 ------------------------------------------------------------------------


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
        c = _philox_round(_philox_round(c, key0, key1, 0), key0, key1, 1)  # unrolled, the loop over i vectorises
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


def random_mask(start, key, taken, limits, mask):
    """Keep position i where its draw is below limits[taken[i]] (of 2**32), into `mask`."""
    numbers = draws(start, mask.size, key)
    if len(limits) == 1:
        _plain_random_kernel(numbers, np.uint64(limits[0]), mask)
    else:
        _random_kernel(numbers, taken, np.array(limits, np.uint64), mask)


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
            bad_vector = np.uint32(bad_vector | np.uint32(np.uint32(vector[i] & vector_magnitude) >= vector_infinity))
            overflow = np.uint32(overflow | np.uint32(np.uint32(new & base_magnitude) >= base_infinity))
        return bad_base != 0, bad_vector != 0, overflow != 0

    return add


def add_kept(base, base_dtype, vector, vector_dtype, mask, scale, out):
    """out = round(base + scale * vector) where mask keeps, in float32, rounded once; elsewhere base's own bits.

    Returns (base had NaN or infinity, vector had, a sum overflowed base's dtype).
    """
    return _add_kernel(_KIND[base_dtype], _KIND[vector_dtype])(base, vector, mask, np.float32(scale), out)


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


def keep_vector(vector, dtype, mask, scale, out):
    """out = round(scale * vector) where mask keeps, +0.0 elsewhere. Returns (had NaN or infinity, overflowed)."""
    return _keep_kernel(_KIND[dtype])(vector, mask, np.float32(scale), out)


# --- what the report measures -------------------------------------------------------------------


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


@njit(nogil=True, cache=True)
def tally_runs(mask, start, m, state):
    """Count what is kept in each whole run of m; `start` is where `mask` begins in its tensor.

    state (int64 [4]): kept so far in the open run, whole runs, their sum, their sum of squares.
    """
    position = 0
    while position < mask.size:
        end = min(mask.size, position + m - (start + position) % m)
        run = mask[position:end]
        kept = np.uint32(0)
        for i in range(run.size):
            kept = np.uint32(kept + np.uint32(run[i]))
        state[0] += kept
        position = end
        if (start + position) % m == 0:
            state[1] += 1
            state[2] += state[0]
            state[3] += state[0] * state[0]
            state[0] = 0
