"""The arithmetic, compiled: numba kernels over the bit patterns of flat arrays.

Arrays hold bits: uint16 for float16 ("F16") and bfloat16 ("BF16"), uint32 for float32 ("F32"). The order of
magnitudes is the order of the bits below the sign, so ranking compares integers and never rounds. Masks are
uint8, 1 = keep.

Each kernel is built for its dtypes (and nm for its m) by a function that numba caches on disk, so the branches
on them cost nothing and are compiled once per machine. All run without the GIL. A file calls no compiled
function of another file: numba's cache would not notice a change there. The same functions in torch:
torch_engine.py.
"""

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
from common.pruners.kernels.philox import draws, random_mask
from common.pruners.kernels.ranking import MAGNITUDE_BITS, count_keys, keys_of, nm_mask, threshold_mask

__all__ = [
    "BITS_DTYPE",
    "BLOCK",
    "MAGNITUDE_BITS",
    "add_kept",
    "all_finite",
    "clamp",
    "convert",
    "count_keys",
    "draws",
    "empty_masks",
    "keep_vector",
    "keys_of",
    "load",
    "nm_mask",
    "random_mask",
    "subtract",
    "tally",
    "threshold_mask",
]

BLOCK = 1 << 18  # elements: with its inputs, masks and outputs a block stays in a core's L2 cache


def load(bits):
    """Bits as this engine computes on them: the array itself."""
    return bits


def empty_masks(vectors: int, size: int):
    """Room for the masks of a block: uint8 [vectors, size]."""
    return np.empty((vectors, size), np.uint8)
