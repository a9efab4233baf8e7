"""Sums of one block: what streamed merges compute.

    linear      Σ wᵢ·xᵢ / Σ wᵢ                        mergekit's `linear`
    delta_sum   base + lambda · Σ wᵢ·(xᵢ − base) / d   mergekit's task_arithmetic, ties, dare_linear, dare_ties
    vector_sum  base + Σ wᵢ·vectorᵢ where masks keep   our cabs, magnitude, random

All arithmetic is float32, each operation rounded by itself unless said otherwise, the result rounded once to the
dtype written. Blocks are bits (uint16 for "F16" and "BF16", uint32 for "F32"), widened a chunk at a time. Where a
block is told its place in the tensor, the bits are the same however the tensor is cut.

mergekit 0.1.5 is followed in its order of operations with `dtype: float32` (tests/test_sums.py compares every bit).
Differs from mergekit: where a sum of differences is zero the base's own bits are kept; mergekit makes a base of −0.0
+0.0 there.

Widening and storing are written here again, chunk by chunk: numba's cache does not notice a change in another file's
compiled functions (common/pruners/kernels/bits.py holds what never changes). No array is reshaped or assigned to a part
of another: for the error that may raise numba compiles its text formatting, which doubles a kernel's time to compile.
"""

from functools import cache, partial

import numpy as np

from common.pruners.kernels import compiler
from common.pruners.kernels.bits import array, bits_of_float32, float32_of_bits, float32_of_half, half_of_float32
from common.pruners.kernels.compiler import Step, in_steps, intrinsic, njit, types
from merge_and_evaluate.sum_inputs import BF16, F16, Block, Rule, in_order, kinds_of, sum_of_weights

_CHUNK = 1024  # elements: float32 rows of two models and what is beside them, 24 kB, stay in a core's first-level cache
# Division as in numpy: x / 0 is infinite, which is reported as not finite. Python's would raise, and does not
# vectorise.
_njit = partial(njit, nogil=True, error_model="numpy")
_kernel = partial(compiler.kernel, error_model="numpy")


# --- bits to values and back ----------------------------------------------------------------------


@intrinsic
def _fused(context, factor, other, addend):
    def codegen(_, builder, __, args):
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@_njit()
def _widen(address, kind, start, values):
    """values, float32 = elements start, start + 1, … of what is at the address, exactly."""
    if kind == F16:
        halves = array(address + 2 * start, values.size, np.uint16)
        for i in range(values.size):
            values[i] = float32_of_half(halves[i])
    elif kind == BF16:
        halves = array(address + 2 * start, values.size, np.uint16)
        for i in range(values.size):
            values[i] = float32_of_bits(np.uint32(halves[i]) << np.uint32(16))
    else:
        floats = array(address + 4 * start, values.size, np.float32)
        for i in range(values.size):
            values[i] = floats[i]


@_njit()
def _all_finite(values):
    most = np.uint32(0)
    for i in range(values.size):
        most = max(most, np.uint32(bits_of_float32(values[i]) & np.uint32(0x7FFFFFFF)))
    return most < np.uint32(0x7F800000)


@_njit()
def _store(values, address, kind, start):
    """Elements from `start` on = values, rounded to nearest even -> whether all of them are finite."""
    size, most = values.size, np.uint16(0)
    if kind == F16:
        halves = array(address + 2 * start, size, np.uint16)
        for i in range(size):
            halves[i] = half_of_float32(values[i])
        for i in range(size):
            most = max(most, np.uint16(halves[i] & np.uint16(0x7FFF)))
        return most < np.uint16(0x7C00)
    if kind == BF16:
        # A NaN may become an infinity here or a zero: either way it was refused, since values are looked at first.
        halves, finite = array(address + 2 * start, size, np.uint16), _all_finite(values)
        for i in range(size):
            word = bits_of_float32(values[i])
            even = (word >> np.uint32(16)) & np.uint32(1)
            halves[i] = np.uint16(np.uint32(word + np.uint32(0x7FFF) + even) >> np.uint32(16))
        for i in range(size):
            most = max(most, np.uint16(halves[i] & np.uint16(0x7FFF)))
        return finite and most < np.uint16(0x7F80)
    floats = array(address + 4 * start, size, np.float32)
    for i in range(size):
        floats[i] = values[i]
    return _all_finite(values)


# --- sums in torch's order ------------------------------------------------------------------------
# torch's sum(dim=0) of k stacked tensors adds k values one after the other in columns that it takes 32 at a time, and
# as four interleaved sums in the columns that are left (ATen, SumKernel.cpp: multi_row_sum, row_sum; on every x86
# processor, whatever the number of threads). From five models on the two differ in the last bit. That holds up to 17
# models: beyond, torch adds sums of 16. task_arithmetic, whose bits are mergekit's, is then left to mergekit
# (streamed_methods.stream_reason); the other methods add in order whatever the number.


@_njit()
def _interleaved(rows, i):
    whole = rows.shape[0] // 4 * 4
    a = b = c = d = np.float32(0)
    for j in range(0, whole, 4):
        a, b, c, d = a + rows[j, i], b + rows[j + 1, i], c + rows[j + 2, i], d + rows[j + 3, i]
    for j in range(whole, rows.shape[0]):
        a += rows[j, i]
    return ((a + b) + c) + d


@_njit()
def _sum_last(rows, in_order, total):
    """The last columns, from `in_order` on, once more: total = the interleaved sums of the rows."""
    for i in range(in_order, total.size):
        total[i] = _interleaved(rows, i)


# --- linear ---------------------------------------------------------------------------------------


@cache
def _linear_kernel():
    @_kernel()
    def linear(args, size):
        models, kinds = args[0], array(args[1], args[0] + 1, np.int64)
        weights, divisor = array(args[2], models, np.float32), array(args[3], 1, np.float32)[0]
        out, first, finite = args[4], 5, True  # args[first + j]: where model j is
        sums, scratch = np.empty(_CHUNK, np.float32), np.empty(_CHUNK, np.float32)
        for start in range(0, size, _CHUNK):
            total, values = sums[: min(_CHUNK, size - start)], scratch[: min(_CHUNK, size - start)]
            total[:] = 0
            for j in range(models):
                _widen(args[first + j], kinds[1 + j], start, values)
                weight = weights[j]
                for i in range(total.size):
                    total[i] = _fused(values[i], weight, total[i])
            for i in range(total.size):
                total[i] /= divisor
            finite &= _store(total, out, kinds[0], start)
        return not finite

    return linear


@in_steps
def linear(out: Block, models: list[Block], weights: tuple[float, ...], normalize: bool = True) -> list[Step]:
    """out = Σ weight·model, divided by the sum of the weights if `normalize` -> whether all of it is finite.

    mergekit's `linear`, bit for bit: weight times value is added with one rounding (torch's addcmul is a fused
    multiply-add), in the recipe's order, from +0.0 on. Weights that sum to zero make a result that is not finite.
    """
    divisor = sum_of_weights(weights) if normalize else np.float32(1)
    numbers = np.array(weights, np.float32), np.array([divisor], np.float32)
    elements = [block.bits for block in (out, *models)]
    return [Step(_linear_kernel(), elements, (len(models), kinds_of(out, *models), *numbers))]


# --- mergekit's sums of differences ---------------------------------------------------------------


# Values are chosen by their bits: `a if mask[i] else b` on bytes and floats side by side does not vectorise without
# AVX-512 (measured: 0.8 ns an element where this takes 0.24).


@_njit(inline="always")
def _all_ones_if(condition):
    """uint32: all bits set where the condition (0 or 1) holds, none where it does not."""
    return np.uint32(np.uint32(0) - np.uint32(condition))


@_njit(inline="always")
def _where(condition, value):
    """value where the condition (0 or 1) holds, else +0.0."""
    return float32_of_bits(np.uint32(bits_of_float32(value) & _all_ones_if(condition)))


_SIGN = np.uint32(0x80000000)


@_njit(inline="always")
def _flipped(value, sign):
    """value, its sign changed where `sign` has the highest bit."""
    return float32_of_bits(np.uint32(bits_of_float32(value) ^ sign))


@_njit()
def _rows(models):
    """Room for a chunk of each model. Rows are summed in twos: an odd number gets a last one of zeros, which changes no
    sum.
    """
    rows = np.empty((models + models % 2, _CHUNK), np.float32)
    for i in range(_CHUNK):  # of the last row; where it is a model's it is written over
        rows[rows.shape[0] - 1, i] = 0
    return rows


@_njit()
def _form_differences(args, first, masks, kinds, scales, weights, start, below, rows):
    """rows[j] = (model j − base) · its scale · its weight, +0.0 where its mask drops.

    args[first + j]: where model j is; args[masks + j], unless masks is 0: its mask.
    """
    for j in range(kinds.size):
        row, scale, weight = rows[j][: below.size], scales[j], weights[j]
        _widen(args[first + j], kinds[j], start, row)
        if masks:
            mask = array(args[masks + j] + start, row.size, np.uint8)
            for i in range(row.size):
                row[i] = _where(mask[i], row[i] - below[i]) * scale * weight
        else:
            for i in range(row.size):
                row[i] = (row[i] - below[i]) * scale * weight


@_njit()
def _sum(rows, total):
    """total = Σ of a column, in order. Two rows at a time: half as often total is read and written."""
    for j in range(0, rows.shape[0], 2):
        one, two = rows[j][: total.size], rows[j + 1][: total.size]
        for i in range(total.size):
            total[i] = ((total[i] if j else np.float32(0)) + one[i]) + two[i]


@_njit()
def _elect(rows, weights, total, votes):
    """total = Σ of a column's values that have the sign of its `total`, where 0 counts as +; votes = Σ of their
    weights.

    Where the total is negative every value's sign is flipped, by its bits, and flipped back in the sum: so one
    comparison finds who agrees, and a sum of negated values is the negated sum, each rounding included. The total has
    its sign all along, as −0.0 too; one that is −0.0 before is of zeros alone, of which none agrees.
    """
    for j in range(0, rows.shape[0], 2):
        one, two, weight, other = rows[j][: total.size], rows[j + 1][: total.size], weights[j], weights[j + 1]
        for i in range(total.size):
            sign = bits_of_float32(total[i]) & _SIGN
            first, second = _flipped(one[i], sign), _flipped(two[i], sign)
            agreed, count = (_flipped(total[i], sign), votes[i]) if j else (np.float32(0), np.float32(0))
            # Not stored back as 0 where it does not agree: a store on a condition does not vectorise.
            agreed += first if first > np.float32(0) else np.float32(0)
            agreed += second if second > np.float32(0) else np.float32(0)
            count += weight if first > np.float32(0) else np.float32(0)
            votes[i] = count + (other if second > np.float32(0) else np.float32(0))
            total[i] = _flipped(agreed, sign)


@_njit()
def _elect_last(rows, weights, in_order, total, votes):
    """The same sums from column `in_order` on, interleaved. Rows are used up there."""
    for i in range(in_order, total.size):
        sign = bits_of_float32(total[i]) & _SIGN
        for j in range(rows.shape[0]):
            rows[j, i] = max(_flipped(rows[j, i], sign), np.float32(0))
        total[i] = _flipped(_interleaved(rows, i), sign)
        for j in range(rows.shape[0]):
            rows[j, i] = weights[j] if rows[j, i] > np.float32(0) else np.float32(0)
        votes[i] = _interleaved(rows, i)


@_njit()
def _change(below, total, votes, by_votes, scale):
    """total = below + total (divided by votes, by 1 where those are 0) · scale; where that is zero, below's own bits.

    Not stored in below: a store on a condition does not vectorise, nor does a condition within the loop.
    """
    if by_votes:
        for i in range(total.size):
            change, own = total[i] / (np.float32(1) if votes[i] == np.float32(0) else votes[i]) * scale, below[i]
            total[i] = own if change == np.float32(0) else own + change
    else:
        for i in range(total.size):
            change, own = total[i] * scale, below[i]
            total[i] = own if change == np.float32(0) else own + change  # −0.0 + 0.0 would be +0.0


@cache
def _delta_kernel():
    @_kernel()
    def delta_sum(args, size):
        models, are_masked, elect, by_votes = args[0], args[1], args[2], args[3]
        in_order, kinds = args[4] - args[9], array(args[5], models + 2, np.int64)
        finite, scratch, rows = True, np.empty((3, _CHUNK), np.float32), _rows(models)
        scales, weights = array(args[6], models, np.float32), array(args[7], rows.shape[0], np.float32)
        common = array(args[8], 2, np.float32)
        divisor, scale = common[0], common[1]
        out, base, first = args[10], args[11], 12
        masks = first + models if are_masked else 0
        for start in range(0, size, _CHUNK):
            stop = min(_CHUNK, size - start)
            below, total, votes = scratch[0][:stop], scratch[1][:stop], scratch[2][:stop]
            plain = min(max(in_order - start, 0), stop)
            _widen(base, kinds[1], start, below)
            _form_differences(args, first, masks, kinds[2:], scales, weights, start, below, rows)
            _sum(rows, total)
            _sum_last(rows[:models], plain, total)
            if elect:
                finite &= _all_finite(total)  # a NaN agrees with nobody: it would be lost in what follows
                _elect(rows, weights, total, votes)
                _elect_last(rows[:models], weights, plain, total, votes)
            if divisor != np.float32(1):
                for i in range(stop):
                    total[i] /= divisor
            _change(below, total, votes, by_votes, scale)
            finite &= _store(total, out, kinds[0], start)
        return not finite

    return delta_sum


@in_steps
def delta_sum(
    out: Block, base: Block, models: list[Block], rule: Rule, place: tuple[int, int], masks=None
) -> list[Step]:
    """out = base + lambda · Σ wᵢ·(modelᵢ − base) / divisor -> whether the result is finite, and so all that went in.

    masks: uint8 [elements] a model, 1 = keep (default: all); what they drop is not looked at: who made them did.
    place: (where the block begins in its tensor, the tensor's elements), which decides the order of the sum from five
    models on. Steps, each rounded to float32: model − base; 0 where the mask drops; times the model's scale; times its
    weight; with rule.elect, what has not the sign of the sum becomes 0; sum; divided (normalize) by Σ wᵢ, 1 if that is
    below 1e-8, or with rule.elect by the Σ wᵢ of those that agree, 1 if that is 0; times lambda; plus base. Where the
    change is zero: the base's own bits, rounded to out's dtype.

    Rule((0.5, 0.5), elect=True): differences 0.2 and −0.1 -> sum 0.05, sign + -> base + 0.1.
    """
    at, numel = place
    shared = rule.normalize and not rule.elect
    divisor = sum_of_weights(rule.weights) if shared else np.float32(1)
    if abs(divisor) < np.float32(1e-8):
        divisor = np.float32(1)  # as mergekit does: weights that cancel are not normalised
    masks = [] if masks is None else list(masks)
    scales = np.array(rule.scales or [1.0] * len(models), np.float32)
    weights = np.zeros(len(models) + len(models) % 2, np.float32)  # one for each of the kernel's rows
    weights[: len(models)] = rule.weights
    elements = (at, *(block.bits for block in (out, base, *models)), *masks)
    numbers = (len(models), len(masks), int(rule.elect), int(rule.elect and rule.normalize))
    common = np.array([divisor, rule.lambda_], np.float32)
    others = (*numbers, in_order(numel), kinds_of(out, base, *models), scales, weights, common)
    return [Step(_delta_kernel(), elements, others)]


# --- our sums of pruned vectors -------------------------------------------------------------------


@_njit()
def _add_kept(total, values, mask, weight):
    """total += weight · values where mask keeps, elsewhere −0.0, which leaves every value's bits as they are."""
    for i in range(total.size):
        total[i] += _flipped(_where(mask[i], _flipped(values[i] * weight, _SIGN)), _SIGN)


@_njit()
def _weigh(row, mask, weight):
    """row = weight · row where mask keeps, else zero."""
    for i in range(row.size):
        row[i] = _where(mask[i], row[i] * weight)


@_njit()
def _add_agreed(below, rows, ones, total, count):
    """below += the mean of the values in a column that have the sign of its total."""
    _elect(rows, ones, total, count)  # our own sums are in plain order to the last column
    for i in range(below.size):
        own = below[i]
        added = own + total[i] / max(count[i], np.float32(1))
        below[i] = added if count[i] > np.float32(0) else own


@cache
def _vector_kernel():
    @_kernel()
    def vector_sum(args, size):
        vectors, consensus, kinds = args[0], args[1], array(args[2], args[0] + 2, np.int64)
        weights, finite = array(args[3], vectors, np.float32), True
        out, base, first = args[4], args[5], 6  # args[first + j]: where vector j is; behind them all, their masks
        scratch, rows = np.empty((3, _CHUNK), np.float32), _rows(vectors)
        ones = np.empty(rows.shape[0], np.float32)
        ones[:] = 1
        for start in range(0, size, _CHUNK):
            stop = min(_CHUNK, size - start)
            below, total, count = scratch[0][:stop], scratch[1][:stop], scratch[2][:stop]
            _widen(base, kinds[1], start, below)
            for j in range(vectors):
                row, mask = rows[j][:stop], array(args[first + vectors + j] + start, stop, np.uint8)
                _widen(args[first + j], kinds[2 + j], start, row)
                # Who agrees is known once all are summed, so consensus keeps a row for each; else each is added at
                # once, and the base's own bits stay where no mask keeps.
                if consensus:
                    _weigh(row, mask, weights[j])
                else:
                    _add_kept(below, row, mask, weights[j])
            if consensus:
                _sum(rows, total)
                _add_agreed(below, rows, ones, total, count)
            finite &= _store(below, out, kinds[0], start)
        return not finite

    return vector_sum


@in_steps
def vector_sum(
    out: Block, base: Block, vectors: list[Block], masks, weights: tuple[float, ...], consensus: bool = False
) -> list[Step]:
    """out = ((base + w₁·v₁) + w₂·v₂) + … where masks keep, rounded once -> whether all of it is finite.

    masks: uint8 [elements] a vector. weights: `weight` times what `rescale` multiplies by, as one float32 factor. Where
    no mask keeps: the base's own bits, rounded to out's dtype.

    consensus (CABS+ III-A): with cᵢ = wᵢ·vᵢ where mask i keeps, else 0, and s the sign of Σ cᵢ in the recipe's order (0
    counts as +), out = base + Σ{cᵢ of sign s} / how many those are; no cᵢ of sign s: the base's bits. A position that
    one vector alone keeps gets its w·v, as without. 0.3, 0.1 and −0.2 kept by three -> base + 0.2.
    """
    elements = (*(block.bits for block in (out, base, *vectors)), *masks)
    others = (len(vectors), int(consensus), kinds_of(out, base, *vectors), np.array(weights, np.float32))
    return [Step(_vector_kernel(), elements, others)]
