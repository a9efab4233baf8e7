"""LoRA: rows of scale · B·A, the same bits for any block size, thread or processor."""

import numpy as np

from common.pruners.kernels.compiler import njit


# No fastmath: each product is rounded before it is added, and nothing is regrouped. A fused multiply-add, which
# "contract" would allow where the processor has one, rounds once instead of twice and changes bits.
@njit(nogil=True, cache=True)
def _delta(a, b, scale, start, stop, out):
    for row in range(start, stop):
        line = out[row - start]
        line[:] = np.float32(0)
        for k in range(a.shape[0]):  # over the rank outside: the inner loop then vectorises without regrouping
            factor = b[row, k]
            for column in range(a.shape[1]):
                line[column] += factor * a[k, column]
        for column in range(a.shape[1]):
            line[column] *= scale


def delta_rows(a, b, scale: float, start: int, stop: int):
    """Rows start:stop of scale · B·A: float32 [rank, in], float32 [out, rank] -> float32 [stop - start, in].

    Each element is ((b0·a0 + b1·a1) + b2·a2 + …) · scale, every step rounded to float32, in the order of the rank.
    delta_rows([[1, 2]], [[3], [4]], 0.5, 1, 2) -> [[2, 4]]
    """
    out = np.empty((stop - start, a.shape[1]), np.float32)
    _delta(np.ascontiguousarray(a), np.ascontiguousarray(b), np.float32(scale), start, stop, out)
    return out
