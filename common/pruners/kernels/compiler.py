"""numba, loaded without scipy.

It would import scipy.linalg, where that is installed, for linear algebra that no kernel here has: 0.1 s of every start.
"""

import sys

_stand_in = sys.modules.setdefault("scipy", None)  # None: an import of it fails at once
try:
    import numba.np.arraymath  # noqa: F401
    from numba import carray, njit, types
    from numba.extending import intrinsic
finally:
    if _stand_in is None:
        del sys.modules["scipy"]
__all__ = ["carray", "intrinsic", "njit", "types"]
