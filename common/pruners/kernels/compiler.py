"""numba, loaded without scipy, compiling without a cache where there is no place for one.

numba would import scipy.linalg, if installed, for linear algebra that no kernel here has: 0.1 s of every start.
"""

import sys
from threading import Lock

from tqdm import tqdm

_stand_in = sys.modules.setdefault("scipy", None)  # None: an import of it fails at once
try:
    import numba.np.arraymath  # noqa: F401
    from numba import carray, types
    from numba import njit as _njit
    from numba.extending import intrinsic
finally:
    if _stand_in is None:
        del sys.modules["scipy"]
__all__ = ["carray", "intrinsic", "njit", "types"]


_said = Lock()  # taken once, never released: one line however many kernels, also when two threads load them at once


def _warn() -> None:
    if not _said.acquire(blocking=False):
        return
    tqdm.write(  # a line of its own, though a progress bar may be there already
        "warning: no place for compiled kernels (neither here nor in the home directory may be written to), so they "
        "are compiled anew at each start; set NUMBA_CACHE_DIR to a directory that can be written to",
        file=sys.stderr,
    )


def njit(**options):
    """numba.njit; without its cache where numba finds no directory for it: a read-only checkout, no writable home."""

    def compiled(function):
        try:
            return _njit(**options)(function)
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
        _warn()
        return _njit(**(options | {"cache": False}))(function)

    return compiled
