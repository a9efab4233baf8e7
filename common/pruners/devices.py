"""Does a device compute the CPU's bits? Asked before a weight is read, of devices that no test of ours has run on
(mps).
"""

import numpy as np

from common.errors import DataError
from common.pruners import kernels
from common.pruners.masks import Masks
from common.pruners.pruning import Pruning
from common.shards.headers import DTYPE_NAMES

_LARGEST = {"F16": 0x7BFF, "BF16": 0x7F7F, "F32": 0x7F7FFFFF}
_METHODS = (Pruning("nm", 0.25, 1, 4, rescale=True), Pruning("random", 0.5), Pruning("magnitude", 0.25))
_NUMEL = 1 << 12


def _probes(dtype: str) -> list[np.ndarray]:
    """Three arrays of finite bits of every size, subnormals and both zeros among them, and ties."""
    found = []
    for seed in range(3):
        bits = np.random.default_rng(seed).integers(0, _LARGEST[dtype] + 1, _NUMEL, kernels.BITS_DTYPE[dtype])
        bits[::5] >>= 6  # small ones: a GPU may take subnormals for zero
        bits[1::7] = bits[0]
        bits[::11] = 0
        found.append(bits | (np.arange(_NUMEL) % 2 << 8 * bits.itemsize - 1).astype(bits.dtype))
    return found


def _results(arithmetic, dtype: str) -> np.ndarray:
    """What an engine makes of the probes: pruned vectors and models by every method, as bits."""
    base, *vectors = _probes(dtype)
    out = []

    def read(j, start, stop):
        return arithmetic.load(vectors[j][start:stop])

    for pruning in _METHODS:
        # Two vectors, because the second one's masks are made from counts of the first one's, in kernels of their own.
        masks = Masks([pruning] * 2, "probe", [dtype] * 2, _NUMEL, arithmetic)
        if masks.in_passes:
            masks.find_thresholds(masks.scanning(read), read)
        for start, stop in masks.blocks():
            bits = [read(j, start, stop) for j in range(2)]
            below = arithmetic.load(base[start:stop])
            for j, mask in enumerate(masks.of(start, bits)):
                added, kept = np.empty((2, stop - start), kernels.BITS_DTYPE[dtype])
                arithmetic.add_kept(added, below, dtype, bits[j], dtype, mask, pruning.scale)
                arithmetic.keep_vector(kept, bits[j], dtype, mask, pruning.scale)
                out += [added, kept]
    return np.concatenate(out)


def check_bits(arithmetic, device: str) -> None:
    """Refuse an engine that masks or rounds a few thousand probing values otherwise than the CPU's kernels."""
    for dtype in kernels.BITS_DTYPE:
        try:
            differ = int((_results(arithmetic, dtype) != _results(kernels, dtype)).sum())
        except (RuntimeError, TypeError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"--device {device}: lacks what pruning needs ({reason:.120}); use --device cpu") from None
        if differ:
            raise DataError(
                f"--device {device}: computes other bits than the CPU ({differ} of the probing {DTYPE_NAMES[dtype]} "
                "values); use --device cpu"
            )
