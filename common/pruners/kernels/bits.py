"""Values and their bits, one by one, and arrays at addresses: what numba lacks, each of them one instruction.

The kernels of two rooms are built on these. numba's cache does not notice a change in this file, so nothing here may
change its meaning: it would need another name.
"""

from llvmlite import ir

from common.pruners.kernels.compiler import carray, intrinsic, njit, types


@intrinsic
def float32_of_half(context, bits):
    """float16 bits, uint16 -> float32, exactly."""

    def codegen(_, builder, __, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def half_of_float32(context, value):
    """float32 -> float16 bits, uint16, rounded to nearest even."""

    def codegen(_, builder, __, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


@intrinsic
def float32_of_bits(context, bits):
    """uint32 -> the float32 of these bits."""

    def codegen(_, builder, __, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def bits_of_float32(context, value):
    """float32 -> its bits, uint32."""

    def codegen(_, builder, __, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@intrinsic
def _pointer(context, address, number):
    def codegen(context, builder, _, args):
        return builder.inttoptr(args[0], context.get_value_type(types.CPointer(number.dtype)))

    return types.CPointer(number.dtype)(types.int64, number), codegen


@njit(inline="always")
def array(address, size, number):
    """The array of so many elements, of numpy's type `number`, that begins at an address."""
    return carray(_pointer(address, number), size)


# --- many keys at a time --------------------------------------------------------------------------

LANES = 32  # keys compared at a time: an AVX-512 register of 16-bit keys, two of AVX2


def _comparing(predicate):
    """keys[start : start + LANES] compared with a limit -> uint32, a bit for each, the first in the lowest.

    Written in LLVM's own words: the loop that says the same in Python widens every comparison to the counter's width
    before it adds, and takes several times as long.
    """

    @intrinsic
    def compare(context, keys, start, limit):
        def codegen(context, builder, signature, args):
            key = context.get_value_type(signature.args[0].dtype)
            lanes, word = ir.VectorType(key, LANES), ir.IntType(LANES)
            first = builder.gep(context.make_array(signature.args[0])(context, builder, args[0]).data, [args[1]])
            # Aligned as a key is, not as a vector: the stack and numpy promise no more.
            values = builder.load(builder.bitcast(first, lanes.as_pointer()), align=key.width // 8)
            nothing, everywhere = ir.Constant(lanes, ir.Undefined), ir.Constant(ir.VectorType(word, LANES), None)
            one = builder.insert_element(nothing, args[2], ir.Constant(word, 0))
            limits = builder.shuffle_vector(one, nothing, everywhere)
            return builder.bitcast(builder.icmp_unsigned(predicate, values, limits), word)

        return types.uint32(keys, types.intp, keys.dtype), codegen

    return compare


which_reach, which_exceed = _comparing(">="), _comparing(">")


@intrinsic
def ones(context, word):
    """How many bits of a uint32 are set."""

    def codegen(_, builder, __, args):
        return builder.zext(builder.ctpop(args[0]), ir.IntType(64))

    return types.int64(types.uint32), codegen


@intrinsic
def lowest(context, word):
    """The number of the lowest bit that is set, of a uint32 that is not 0."""

    def codegen(_, builder, __, args):
        return builder.zext(builder.cttz(args[0], ir.Constant(ir.IntType(1), 1)), ir.IntType(64))

    return types.int64(types.uint32), codegen
