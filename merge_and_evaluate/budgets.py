"""What TIES keeps, and what DARE multiplies the rest by, as mergekit 0.1.5 has it."""

from functools import cache

import numpy as np

from common.pruners.kernels.compiler import njit

_EXPONENTS = 256


def ties_budget(density: float, numel: int) -> int:
    """How many elements of a tensor `ties` keeps: max(1, ⌊density·numel⌋), all from 1 on, none up to 0.

    ties_budget(0.3, 10) -> 3; ties_budget(0.01, 10) -> 1
    """
    if density >= 1:
        return numel
    return max(1, int(density * numel)) if density > 0 and numel else 0


@cache
def _norm_kernel():
    @njit(nogil=True, cache=True)
    def add_norms(sums, delta, mask):
        for i in range(delta.size):
            exponent = (delta[i] >> np.uint32(23)) & np.uint32(0xFF)
            digits = np.int64(delta[i] & np.uint32(0x7FFFFF)) + (np.int64(1 << 23) if exponent else np.int64(0))
            sums[0, exponent] += digits
            sums[1, exponent] += digits if mask[i] else np.int64(0)

    return add_norms


def empty_norms() -> np.ndarray:
    """Where add_norms counts one model's tensor: int64 [2, 256]."""
    return np.zeros((2, _EXPONENTS), np.int64)


def add_norms(sums: np.ndarray, delta: np.ndarray, mask: np.ndarray) -> None:
    """Add |delta| of a block to sums[0], and of what mask keeps to sums[1].

    delta: float32 bits, uint32 [elements], all finite, as kernels.subtract(model, …, base, …, delta, "F32") forms them. mask:
    uint8 [elements]. Exact: the digits of all values of an exponent are added as integers, so no order, block size or
    number of threads changes a bit, and parts counted apart may be added up. Good for 2**39 elements a tensor.
    """
    if delta.size != mask.size:
        raise ValueError(f"a mask of {mask.size} for {delta.size} elements")
    _norm_kernel()(sums, delta, mask)


def rescale_factor(sums: np.ndarray) -> np.float32:
    """What mergekit's `rescale` multiplies kept values by: Σ|all| / Σ|kept| in float32, or 1 if one is below 1e-7."""
    before, after = (
        np.float32(sum(int(digits) << max(e, 1) for e, digits in enumerate(row)) * 2.0**-150) for row in sums
    )
    small = np.float32(1e-7)
    return np.float32(1) if before < small or after < small else before / after
