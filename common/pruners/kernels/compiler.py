"""numba: how kernels are compiled, kept on disk and called.

A kernel is a function of addresses, kernel(args, size) -> 1 if it met a value that is not finite, else 0. So one
compiled loop calls any of them: several kernels go over a block in one call, without Python and its lock between them,
stretch by stretch, and what one leaves in scratch memory the next one finds in the second-level cache.

numba would import scipy.linalg, if installed, for linear algebra that no kernel here has: 0.1 s of every start.
"""

import sys
from ctypes import addressof, c_char
from functools import partial, wraps
from threading import Lock
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from tqdm import tqdm

_stand_in = sys.modules.setdefault("scipy", None)  # None: an import of it fails at once
try:
    import numba.np.arraymath  # noqa: F401
    from numba import carray, cfunc, types
    from numba import njit as _njit
    from numba.extending import intrinsic
finally:
    if _stand_in is None:
        del sys.modules["scipy"]
__all__ = ["Step", "address", "carray", "in_steps", "intrinsic", "kernel", "list_steps", "njit", "take", "types"]


_said = Lock()  # taken once, never released: one line however many kernels, also when two threads load them at once


def _warn() -> None:
    if not _said.acquire(blocking=False):
        return
    tqdm.write(  # a line of its own, though a progress bar may be there already
        "warning: compiled kernels cannot be cached (neither this directory nor your home directory is writable), so "
        "they are compiled at every start; set NUMBA_CACHE_DIR to a writable directory",
        file=sys.stderr,
    )


def _compiled(compiler, options: dict):
    """The decorator compiler(**options); without its cache where numba finds no directory for it: a read-only
    checkout, no writable home."""

    def compiled(function):
        try:
            return compiler(**options)(function)
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
        _warn()
        return compiler(**(options | {"cache": False}))(function)

    return compiled


def njit(**options):
    """numba.njit, for what kernels are made of."""
    return _compiled(_njit, options)


def kernel(**options):
    """Compile kernel(args, size): args, int64, are a Step's addresses and numbers, size says how many elements.

    Cached on disk. Nothing here is checked: list_steps() does that.
    """
    return _compiled(partial(cfunc, types.int64(types.CPointer(types.int64), types.int64)), options | {"cache": True})


# --- taking steps ---------------------------------------------------------------------------------


class Step(NamedTuple):
    """A kernel and its args: first `others`, then `elements`, of which there may be any number.

    elements: flat arrays with an element for each of the block's; or an integer, the position of the first element.
    others: integers, and arrays that are the same for every element.
    """

    kernel: object  # not its address alone: who holds the kernel holds the code
    elements: tuple
    others: tuple = ()


@intrinsic
def _call(context, address, args, size):
    def codegen(_, builder, __, given):
        number = ir.IntType(64)
        function = ir.FunctionType(number, [number.as_pointer(), number])
        pointers = [builder.inttoptr(given[0], function.as_pointer()), builder.inttoptr(given[1], number.as_pointer())]
        return builder.call(pointers[0], [pointers[1], given[2]])

    return types.int64(types.int64, types.int64, types.int64), codegen


@njit(nogil=True, cache=True)
def take(listing, moves, size, stretch):
    """Take what list_steps() lists on `size` elements, stretch by stretch -> whether all values are finite.

    The listing moves along; without moves (an empty array) there is one stretch.
    """
    for start in range(0, size, stretch):
        at = 0
        while at < listing.size:
            if _call(listing[at], listing.ctypes.data + 8 * (at + 2), min(stretch, size - start)):
                return False
            at += 2 + listing[at + 1]
        for i in range(moves.size):
            listing[i] += moves[i]
    return True


_ALL_AT_ONCE = np.zeros(0, np.int64)


def address(array) -> int:
    """Where an array begins. Raises ValueError unless it is contiguous and may be written to: the kernels do not
    check."""
    try:
        return addressof(c_char.from_buffer(array))  # array.ctypes.data takes four times as long
    except TypeError as error:
        raise ValueError(f"an array for a kernel: {error}") from None


def list_steps(steps: list[Step], size: int) -> list[int]:
    """What take() reads, step by step: the kernel's address, how many args it has, the args.

    Raises ValueError for elements of another number than `size`: the kernels check no bounds.
    """
    listing = []
    for compiled, elements, others in steps:
        listing += compiled.address, len(others) + len(elements)
        listing += [each if isinstance(each, int) else address(each) for each in others]
        for each in elements:
            if isinstance(each, int):
                listing.append(each)
            elif each.size == size:
                listing.append(address(each))
            else:
                raise ValueError(f"blocks of one size, got {each.size} elements beside {size}")
    return listing


def in_steps(function):
    """Decorator of a function that lists steps: a call takes them at once and returns whether all values are finite.

    The attribute `steps` is the function undecorated: program.py notes its steps, and takes them later among others.
    """

    @wraps(function)
    def at_once(*given, **named) -> bool:
        steps = function(*given, **named)
        size = next((each.size for step in steps for each in step.elements if not isinstance(each, int)), 0)
        return size == 0 or bool(take(np.array(list_steps(steps, size), np.int64), _ALL_AT_ONCE, size, size))

    at_once.steps = function
    return at_once
