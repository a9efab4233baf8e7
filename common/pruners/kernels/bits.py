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
