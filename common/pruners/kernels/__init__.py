"""The arithmetic: kernels over the bit patterns of flat arrays, in two engines that give the same bits.

arithmetic.py    values: convert, subtract, add what a mask keeps, count
ranking.py       which positions rank first; masks from thresholds
groups.py        ranking in groups of a large m
philox.py        random masks
bits.py          values and their bits, arrays at addresses: what numba lacks
compiler.py      numba: how kernels are compiled, kept on disk and called
program.py       several kernels in one call, stretch by stretch
torch_engine.py  the same functions in torch, for a GPU

Arrays hold bits: uint16 for float16 ("F16") and bfloat16 ("BF16"), uint32 for float32 ("F32"). The order of
magnitudes is the order of the bits below the sign, so ranking compares integers and never rounds. Masks are
uint8, 1 = keep.

Each numba kernel is built for its dtypes (and nm for its m), so the branches on them cost nothing, and compiled once
per machine. All run without the GIL. A file calls no compiled function of another file but bits.py: numba's cache would
not notice a change there.

A function that is @in_steps lists steps: kernels, and what each is given. Calling it takes them at once and returns
whether all values are finite; a program notes them instead, with those of other functions, and takes all in one call.
"""

from types import SimpleNamespace

import numpy as np

from common.pruners.kernels.arithmetic import (
    BITS_DTYPE,
    add_kept,
    all_finite,
    clamp,
    convert,
    keep_vector,
    subtract,
    tally,
)
from common.pruners.kernels.philox import random_mask
from common.pruners.kernels.ranking import (
    MAGNITUDE_BITS,
    count_keys,
    count_taken,
    drop_zeros,
    keys_of,
    nm_mask,
    threshold_mask,
)

# Elements: a block's inputs, masks and outputs stay in the cores' L2 and L3 caches from the first pass to the last.
# Eight times as many nearly halve the speed, and far fewer cost as much in handing blocks over (measured).
BLOCK = 1 << 18


def load(bits):
    """Bits as this engine computes on them: the array itself."""
    return bits


def empty_masks(vectors: int, size: int):
    """Room for the masks of a block: uint8 [vectors, size]."""
    return np.empty((vectors, size), np.uint8)


# What an engine is: these functions, with the same parameters in both. (Convert and extract run on the CPU alone.)
_FUNCTIONS = (
    add_kept,
    all_finite,
    count_keys,
    count_taken,
    drop_zeros,
    empty_masks,
    keep_vector,
    keys_of,
    load,
    nm_mask,
    random_mask,
    tally,
    threshold_mask,
)
ENGINE = tuple(function.__name__ for function in _FUNCTIONS)
__all__ = ["BITS_DTYPE", "BLOCK", "ENGINE", "MAGNITUDE_BITS", "clamp", "convert", "engine", "subtract", *ENGINE]


def engine(device: str) -> SimpleNamespace:
    """The functions of ENGINE, BLOCK and MAGNITUDE_BITS: compiled by numba for "cpu", else in torch on that device.

    Raises DataError where torch has no such device.
    """
    if device == "cpu":
        functions = dict(zip(ENGINE, _FUNCTIONS, strict=True))
        return SimpleNamespace(BLOCK=BLOCK, MAGNITUDE_BITS=MAGNITUDE_BITS, **functions)
    from common.pruners.kernels import torch_engine  # torch takes seconds to import

    return torch_engine.engine(device)
